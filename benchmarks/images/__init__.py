"""Small vision transformers that are pretrained, fine-tuned and merged. See vision.py.

From the ground up: `data` reads images, `model` is the network, `training` makes the
models that are merged, `measuring` says how good parameters are, `merges` merges them,
and `claims` asks what papers say of such merges.
"""
