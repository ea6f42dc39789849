"""vimnas_ds: an entangled ViT supernet for images and video, and its best sub-network."""

__version__ = "0.1.0"
