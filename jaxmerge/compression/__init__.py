"""Many fine-tuned models in the space of two: masks as bits, low rank, few bits."""

from jaxmerge.compression.building import add_task, create_store
from jaxmerge.compression.files import StoreError
from jaxmerge.compression.packing import add_masked, pack, unpack
from jaxmerge.compression.quantising import (
    Codes,
    Signs,
    binarise,
    debinarise,
    dequantise,
    quantise,
)
from jaxmerge.compression.sizes import predicted_bits
from jaxmerge.compression.store import Sizes, Store, open_store

__all__ = [
    "Codes",
    "Signs",
    "Sizes",
    "Store",
    "StoreError",
    "add_masked",
    "add_task",
    "binarise",
    "create_store",
    "debinarise",
    "dequantise",
    "open_store",
    "pack",
    "predicted_bits",
    "quantise",
    "unpack",
]
