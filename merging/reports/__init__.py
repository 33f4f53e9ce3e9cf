"""What a merge will do, would do and did: estimates, diagnostics, advice, numbers, pages, model cards."""
