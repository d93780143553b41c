"""The parts of `benchmarks/text.py`: a pretrained encoder, its tasks, their merges."""
