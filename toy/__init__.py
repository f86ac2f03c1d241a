"""toy/: a world whose truth is known, its texts, stand-in data, and the toy CLIP and LLaMA."""
