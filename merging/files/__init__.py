"""Files: safetensors read lazily and written as a stream, folders that appear when they are complete, the Hub."""
