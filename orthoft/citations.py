"""The papers of adapters, methods and spaces, as people cite them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

ARXIV = re.compile(r"\b\d{4}\.\d{4,5}\b")


class Paper(NamedTuple):
    """Authors in the order of the paper, its title, and the year of its first version."""

    authors: tuple[str, ...]
    title: str
    year: int


def _paper(authors: str, title: str, year: int) -> Paper:
    return Paper(tuple(authors.split(", ")), title, year)


PAPERS = {
    "2106.09685": _paper(
        "Edward J. Hu, Yelong Shen, Phillip Wallis, Zeyuan Allen-Zhu, Yuanzhi Li, Shean Wang, Lu Wang, Weizhu Chen",
        "LoRA: Low-Rank Adaptation of Large Language Models",
        2021,
    ),
    "2111.09832": _paper("Michael Matena, Colin Raffel", "Merging Models with Fisher-Weighted Averaging", 2021),
    "2203.05482": _paper(
        "Mitchell Wortsman, Gabriel Ilharco, Samir Yitzhak Gadre, Rebecca Roelofs, Raphael Gontijo-Lopes, "
        "Ari S. Morcos, Hongseok Namkoong, Ali Farhadi, Yair Carmon, Simon Kornblith, Ludwig Schmidt",
        "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference "
        "time",
        2022,
    ),
    "2212.04089": _paper(
        "Gabriel Ilharco, Marco Tulio Ribeiro, Mitchell Wortsman, Suchin Gururangan, Ludwig Schmidt, "
        "Hannaneh Hajishirzi, Ali Farhadi",
        "Editing Models with Task Arithmetic",
        2022,
    ),
    "2212.09849": _paper(
        "Xisen Jin, Xiang Ren, Daniel Preotiuc-Pietro, Pengxiang Cheng",
        "Dataless Knowledge Fusion by Merging Weights of Language Models",
        2022,
    ),
    "2306.01708": _paper(
        "Prateek Yadav, Derek Tam, Leshem Choshen, Colin Raffel, Mohit Bansal",
        "TIES-Merging: Resolving Interference When Merging Models",
        2023,
    ),
    "2310.11454": _paper(
        "Dawid J. Kopiczko, Tijmen Blankevoort, Yuki M. Asano", "VeRA: Vector-based Random Matrix Adaptation", 2023
    ),
    "2311.03099": _paper(
        "Le Yu, Bowen Yu, Haiyang Yu, Fei Huang, Yongbin Li",
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
        2023,
    ),
    "2312.02432": _paper(
        "Ryan Po, Guandao Yang, Kfir Aberman, Gordon Wetzstein",
        "Orthogonal Adaptation for Modular Customization of Diffusion Models",
        2023,
    ),
    "2312.06795": _paper(
        "MohammadReza Davari, Eugene Belilovsky",
        "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
        2023,
    ),
    "2403.19522": _paper(
        "Dong-Hwan Jang, Sangdoo Yun, Dongyoon Han", "Model Stock: All we need is just a few fine-tuned models", 2024
    ),
    "2404.04316": _paper(
        "Xinyu Ma, Xu Chu, Zhibang Yang, Yang Lin, Xin Gao, Junfeng Zhao",
        "Parameter Efficient Quasi-Orthogonal Fine-Tuning via Givens Rotation",
        2024,
    ),
    "2405.17484": _paper(
        "Shen Yuan, Haotian Liu, Hongteng Xu",
        "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
        2024,
    ),
    "2405.19597": _paper(
        "Vijay Lingam, Atula Tejaswi, Aditya Vavre, Aneesh Shetty, Gautham Krishna Gudur, Joydeep Ghosh, "
        "Alex Dimakis, Eunsol Choi, Aleksandar Bojchevski, Sujay Sanghavi",
        "SVFT: Parameter-Efficient Fine-Tuning with Singular Vectors",
        2024,
    ),
    "2406.11617": _paper(
        "Pala Tej Deep, Rishabh Bhardwaj, Soujanya Poria",
        "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
        2024,
    ),
    "2408.07990": _paper(
        "Fanqi Wan, Longguang Zhong, Ziyi Yang, Ruijun Chen, Xiaojun Quan",
        "FuseChat: Knowledge Fusion of Chat Models",
        2024,
    ),
    "2410.02396": _paper(
        "Guodong Du, Junlin Lee, Jing Li, Runhua Jiang, Yifei Guo, Shuyang Yu, Hanting Liu, Sim Kuan Goh, "
        "Ho-Kin Tang, Daojing He, Min Zhang",
        "Parameter Competition Balancing for Model Merging",
        2024,
    ),
    "2410.19735": _paper(
        "George Stoica, Pratik Ramesh, Boglarka Ecsedi, Leshem Choshen, Judy Hoffman",
        "Model merging with SVD to tie the Knots",
        2024,
    ),
    "2412.00081": _paper(
        "Antonio Andrea Gargiulo, Donato Crisostomi, Maria Sofia Bucarelli, Simone Scardapane, Fabrizio Silvestri, "
        "Emanuele Rodolà",
        "Task Singular Vectors: Reducing Task Interference in Model Merging",
        2024,
    ),
    "2412.12153": _paper(
        "Jiho Choi, Donggyun Kim, Chanhyuk Lee, Seunghoon Hong", "Revisiting Weight Averaging for Model Merging", 2024
    ),
    "2501.09522": _paper(
        "Anke Tang, Enneng Yang, Li Shen, Yong Luo, Han Hu, Bo Du, Dacheng Tao",
        "Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model Merging",
        2025,
    ),
    "2502.04959": _paper(
        "Daniel Marczak, Simone Magistri, Sebastian Cygert, Bartłomiej Twardowski, Andrew D. Bagdanov, "
        "Joost van de Weijer",
        "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
        2025,
    ),
    "2503.08099": _paper(
        "Runxi Cheng, Feng Xiong, Yongxian Wei, Wanyun Zhu, Chun Yuan",
        "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors",
        2025,
    ),
    "2503.12649": _paper(
        "Hao Mark Chen, Shell Xu Hu, Wayne Luk, Timothy Hospedales, Hongxiang Fan",
        "FW-Merging: Scaling Model Merging with Frank-Wolfe Optimization",
        2025,
    ),
    "2505.11235": _paper(
        "Fei Wu, Jia Hu, Geyong Min, Shiqiang Wang",
        "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation",
        2025,
    ),
    "2505.22934": _paper(
        "Haobo Zhang, Jiayu Zhou",
        "Unraveling LoRA Interference: Orthogonal Subspaces for Robust Model Merging",
        2025,
    ),
    "2506.19847": _paper(
        "Zeju Qiu, Weiyang Liu, Adrian Weller, Bernhard Schölkopf", "Orthogonal Finetuning Made Scalable", 2025
    ),
    "2509.11167": _paper(
        "Pouria Mahdavinia, Hamed Mahdavi, Niloofar Mireshghallah, Mehrdad Mahdavi",
        "Harnessing Optimization Dynamics for Curvature-Informed Model Merging",
        2025,
    ),
    "2509.17786": _paper(
        "Aniello Panariello, Daniel Marczak, Simone Magistri, Angelo Porrello, Bartłomiej Twardowski, "
        "Andrew D. Bagdanov, Simone Calderara, Joost van de Weijer",
        "Accurate and Efficient Low-Rank Model Merging in Core Space",
        2025,
    ),
    "2602.05943": _paper("Sihan Yang, Kexuan Shi, Weiyang Liu", "Orthogonal Model Merging", 2026),
    "2603.04972": _paper(
        "Jiayu Wang, Zuojun Ye, Wenpeng Yin", "Functionality-Oriented LLM Merging on the Fisher--Rao Manifold", 2026
    ),
}


def cited_in(documented: object) -> list[str]:
    """Return the arXiv ids in the docstring of a module or a function."""
    return ARXIV.findall(documented.__doc__ or "")


def bibtex(arxiv: str) -> str:
    """Return the BibTeX entry of a paper.

    Raises:
        KeyError: it is not in the table.
    """
    authors, title, year = PAPERS[arxiv]
    return (
        f"@misc{{arxiv:{arxiv},\n  title = {{{{{title}}}}},\n  author = {{{' and '.join(authors)}}},\n"
        f"  year = {{{year}}},\n  eprint = {{{arxiv}}},\n  archivePrefix = {{arXiv}},\n}}"
    )


def citation_section(arxiv: Iterable[str], title: str = "Cite") -> list[str]:
    """Return the lines of a model card that cite papers under a title, each once; none without papers."""
    entries = [bibtex(paper) for paper in dict.fromkeys(arxiv)]
    return [f"## {title}", "", "```bibtex", "\n\n".join(entries), "```", ""] if entries else []
