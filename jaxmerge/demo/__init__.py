"""The main job on real input: fine-tune, merge, compare. See `jaxmerge demo`."""
