"""formats/processors.py: preprocessor_config.json and processor_config.json, in which a published
model says how its pictures are prepared.

transformers obeys every key of these files. Here a picture is resized by Pillow's bicubic to the
side of the vision tower, scaled by 1/255, and normalised by CLIP's mean and std. Four ways:

    square   size {"shortest_edge": S}, do_center_crop
    pad      LlavaImageProcessor with do_pad: a square of the mean colour first
    squash   size {"height": S, "width": S}, whatever the picture's shape
    anyres   LlavaNextImageProcessor: the whole picture and its tiles

`Processor.aspect` says which of them a folder's files ask for. What else they ask for is refused by
name. Sizes are in pixels.
Source: transformers 5.23, image_processing_utils.py and image_processing_pil_*.py."""
import math
from pathlib import Path

from formats.errors import BadModel
from formats.strict_json import read_config

MEAN = 0.48145466, 0.4578275, 0.40821073            # CLIP's, of RGB in 0 .. 1
STD = 0.26862954, 0.26130258, 0.27577711
KINDS = {"clip": "CLIP", "llava": "Llava", "llava_next": "LlavaNext",
         "blip-2": "Blip", "instructblip": "Blip"}  # transformers' choice where no file names one
SWITCHES = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad",
            "do_convert_rgb")


class Processor:
    """The picture settings of a folder, with transformers' defaults for what is left out. All
    methods that find a setting which cannot be obeyed raise BadModel."""

    def __init__(self, folder, model_type):
        """model_type: config.json's, for a folder whose files do not name a processor: a CLIP's,
        if it is none of the others."""
        self.folder, self.file = folder, "processor_config.json"
        outer = read_config(folder, self.file, missing_ok=True)
        self.outer, settings = outer, outer.get("image_processor")
        if settings is None:                        # the nested settings win over the older file
            self.file = "preprocessor_config.json"
            settings = read_config(folder, self.file, missing_ok=True)
        if type(settings) is not dict:
            self.refuse("image_processor", settings, "an object is expected")
        self.settings = {key: value for key, value in settings.items() if value is not None}
        name = self.settings.get("image_processor_type") or str(
            self.settings.get("feature_extractor_type", "")).replace("FeatureExtractor",
                                                                 "ImageProcessor")
        name = name or f"{KINDS.get(model_type, 'CLIP')}ImageProcessor"
        for ending in ("Fast", "Pil"):              # the same steps by another library
            name = str(name).removesuffix(ending)
        self.kind = name.removesuffix("ImageProcessor")
        if self.kind not in KINDS.values():
            self.refuse("image_processor_type", name, "known are Llava-, LlavaNext-, Blip- and "
                        "CLIPImageProcessor")

    def refuse(self, key, value, why, file=None):
        raise BadModel(f"{Path(self.folder) / (file or self.file)} says {key} {str(value)[:80]!r}: "
                       f"{why}; take the file of the weights, or another model")

    def switch(self, key, default):
        value = self.settings.get(key, default)
        if type(value) is not bool:
            self.refuse(key, value, "true or false is expected")
        return value

    def side(self, key, to_square):
        """(height, width) of a size, or (shortest edge, None); None if the file does not say."""
        value = self.settings.get(key)
        if value is None:
            return None
        if type(value) is int:
            return (value, value if to_square else None)
        if type(value) is list and len(value) == 2:
            return tuple(value)
        if type(value) is dict and set(value) == {"height", "width"}:
            return value["height"], value["width"]
        if type(value) is dict and set(value) == {"shortest_edge"}:
            return value["shortest_edge"], None
        self.refuse(key, value, "only a number, a height and width, or a shortest_edge is known")

    def numbers(self, key, wanted):
        """Refuse a number, or three, that are not `wanted` (in seven digits)."""
        value = self.settings.get(key, wanted)
        each = value if type(value) in (list, tuple) else [value]
        right = wanted if type(wanted) is tuple else [wanted]
        if not all(type(x) in (int, float) for x in each) or len(each) != len(right) or not all(
                math.isclose(a, b, rel_tol=1e-6) for a, b in zip(each, right)):
            self.refuse(key, value, f"pictures are shown here with {wanted} only")

    def values(self):
        """Refuse numbers that are not CLIP's, and steps that are not known here."""
        self.numbers("image_mean", MEAN)
        self.numbers("image_std", STD)
        self.numbers("rescale_factor", 1 / 255)
        self.numbers("resample", 3)                 # Pillow's number of bicubic
        for key in SWITCHES:
            self.switch(key, True)
        for key in ("do_rescale", "do_normalize"):
            if not self.switch(key, True):
                self.refuse(key, False, "pictures are always scaled by 1/255 and normalised here")
        for key, value in self.settings.items():
            if key.startswith("do_") and key not in SWITCHES and value not in (False, 0):
                self.refuse(key, value, "this step is not known here")

    def aspect(self, size):
        """square, pad, squash or anyres, for a tower of `size` pixels. Raises BadModel."""
        self.values()
        blip, tiles = self.kind == "Blip", self.kind == "LlavaNext"
        if self.kind == "CLIP" and self.settings.get("use_square_size"):
            self.settings["size"] = {"height": 224, "width": 224}
        height, width = self.side("size", blip) or (size, size if blip else None)
        crop = self.side("crop_size", True) or (size, size)
        padded = self.kind == "Llava" and self.switch("do_pad", False)
        cropped = self.switch("do_center_crop", not blip)
        if height != size or width not in (size, None):
            self.refuse("size", self.settings["size"],
                        f"the vision tower takes {size} pixels a side")
        if (cropped or tiles) and crop != (size, size):
            self.refuse("crop_size", self.settings["crop_size"],
                        f"the vision tower takes {size} pixels a side")
        if tiles:
            return "anyres"                         # tiles have the right size before any resize
        if not self.switch("do_resize", True):
            self.refuse("do_resize", False, "pictures are always resized here")
        if width is None and not (cropped or padded):
            key = "do_center_crop" if "do_center_crop" in self.settings else "size"
            self.refuse(key, self.settings.get(key), "without a crop a picture that is no square "
                        f"would not become {size} x {size}")
        canvas, pads = self.side("pad_size", True) or (size, size), self.switch("do_pad", False)
        if self.kind in ("CLIP", "Blip") and pads and canvas != (size, size):
            self.refuse("pad_size", self.settings["pad_size"],
                        f"the vision tower takes {size} pixels a side")
        if padded:
            return "pad"
        return "square" if width is None else "squash"

    def expect(self, size, aspect, why):
        """Refuse files that ask for another way than this. A folder without files asks for none."""
        found = self.aspect(size)
        if self.settings and found != aspect:
            keys = "image_processor_type", "do_pad", "size"
            values = ", ".join(f"{key} {self.settings[key]}" for key in keys
                               if key in self.settings)
            raise BadModel(f"{Path(self.folder) / self.file} says {values}: pictures would be "
                           f"shown in the way {found!r}, but {why}; take the files of one model")

    def image_tokens(self, patch, queries=None):
        """Refuse files that give a picture another number of tokens than it becomes: transformers
        would raise an error. queries: of a Q-Former, or None."""
        outer, file = self.outer, "processor_config.json"
        chosen = outer.get("vision_feature_select_strategy", "default")
        right = {"patch_size": patch, "num_additional_image_tokens": int(chosen == "default")}
        if queries is not None:
            right = {"num_query_tokens": queries}
        elif chosen not in ("default", "full", None):
            self.refuse("vision_feature_select_strategy", chosen, "default is expected", file)
        for key, value in right.items():
            if outer.get(key, value) not in (value, None):
                self.refuse(key, outer[key], f"of this model it is {value}", file)

    def pinpoints(self, wanted):
        """Refuse grids that are not config.json's: by those the tiles are put together again."""
        found = self.settings.get("image_grid_pinpoints")
        if found is not None and found != wanted:
            self.refuse("image_grid_pinpoints", found, f"config.json says {str(wanted)[:80]}")
