"""Transferable visual prompting.

One prompt of pixels, learned on one frozen multimodal language model, that helps the others.
"""

__version__ = "0.1.0"

import lazy_loader

# __init__.pyi lists the names; torch is loaded with the first of them
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
