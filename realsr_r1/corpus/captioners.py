"""Pretrained models that caption photos and name what is in them, and the cleaning of what they
say.

Florence-2 has a task token for each level of detail, Qwen2.5-VL gets a prompt a level; Grounding
DINO finds the things that captions name, and SAM outlines them. The models and processors are
transformers' own; here is what to ask them, in batches, and what of the answer to keep. Run over a
folder they make `annotate`. Weights have licences of their own.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import transformers
from PIL import Image
from torch import Tensor

# Name on the command line → hub repository, class and model type in transformers.
MODELS = {
    "florence-2": (
        "florence-community/Florence-2-base",
        "Florence2ForConditionalGeneration",
        "florence2",
    ),
    "qwen2.5-vl": (
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_vl",
    ),
    "grounding-dino": (
        "IDEA-Research/grounding-dino-tiny",
        "GroundingDinoForObjectDetection",
        "grounding-dino",
    ),
    "sam": ("facebook/sam-vit-base", "SamModel", "sam"),
}
MOST_TAGS = 12

# ---------------------------------------------------------------- words

_LEAD = re.compile(
    r"(?:in (?:this|the) (?:image|picture|photo)\b,?\s*(?:(?:we|i|you|one) (?:can )?see|there "
    r"(?:is|are))?"
    r"|(?:the|this) "
    r"(?:image|picture|photo|photograph)\b\s*(?:shows|features|depicts|displays|captures|is)?"
    r"|an? (?:image|picture|photo|photograph) (?:of|showing))\s*",
    re.IGNORECASE,
)
# Words between things: they end a phrase, and no tag begins with one.
_BETWEEN = frozenset(
    "a an the this that these those some its his her their it there he she they and or but with "
    "without of on in at by to from into over under "
    "near behind beside between among around through against along across above below front top "
    "side middle center foreground background is are "
    "was has have had can be being been which who while as for not no one image picture photo "
    "photograph view scene sitting standing lying "
    "walking looking shows seen visible appears appear".split()
)


def clean_caption(text: str) -> str:
    """A generated caption without special tokens, without leads such as "The image shows", and
    without a last sentence that the length limit cut off (unless it is the only one)."""
    text = " ".join(re.sub(r"<[^<>]*>", " ", text).split())
    while (match := _LEAD.match(text)) and match.end() < len(text):
        text = text[match.end() :]
    if text and text[-1] not in ".!?" and (whole := re.match(r".*[.!?](?=\s)", text)):
        text = whole[0]
    return text[:1].upper() + text[1:]


def clean_tag(text: str) -> str:
    """A detector's label as a tag: lower case, word pieces joined, without special tokens,
    punctuation and words before the thing; "" if nothing is left."""
    text = re.sub(r"<[^<>]*>|\[[A-Z]+\]", " ", text).replace(" ##", "").replace("##", "")
    words = re.findall(r"\w+(?:['-]\w+)*", text.lower())
    while words and words[0] in _BETWEEN:
        words.pop(0)
    return " ".join(words)


def unique(tags: Iterable[str]) -> list[str]:
    """Cleaned tags, each once, in order, `MOST_TAGS` at most."""
    return list(dict.fromkeys(t for t in map(clean_tag, tags) if t))[:MOST_TAGS]


def phrases_of(captions: Sequence[str]) -> list[str]:
    """The things that captions name, as phrases of at most three words to look for: "a white bird
    on grass" → "white bird", "grass"."""
    found = []
    for part in re.split(r"[^\w\s'-]", " . ".join(captions).lower()):
        run = []
        for word in [*part.split(), "a"]:
            if word not in _BETWEEN:
                run.append(word)
            elif run:
                found.append(" ".join(run[-3:]))
                run = []
    return list(dict.fromkeys(found))[:24]


def parse_od(text: str) -> list[dict]:
    """Florence-2's answer to <OD>, "bird<loc_10><loc_20><loc_500><loc_999>grass<loc_…>…" → [{"tag",
    "box"}]; boxes are (left, top, right, bottom) as fractions of width and height (a location is
    the middle of one of 1,000 bins)."""
    out = []
    for label, places in re.findall(r"([^<>]+)((?:<loc_\d+>)+)", re.sub(r"</?s>|<pad>", "", text)):
        bins = [(int(n) + 0.5) / 1000 for n in re.findall(r"\d+", places)]
        out += [
            {"tag": clean_tag(label), "box": bins[i : i + 4]}
            for i in range(0, len(bins) - 3, 4)
            if clean_tag(label)
        ]
    return out


# ---------------------------------------------------------------- models


class Florence:
    """Captions and objects by Florence-2 (Xiao et al. 2023, arXiv 2311.06242), one task token a
    question."""

    TASKS = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")

    def __init__(self, model, processor, max_new_tokens: int = 256, beams: int = 3):
        self.model, self.processor, self.options = (
            model,
            processor,
            {"max_new_tokens": max_new_tokens, "num_beams": beams, "do_sample": False},
        )

    @torch.no_grad()
    def ask(self, images: list[Image.Image], task: str) -> list[str]:
        inputs = self.processor(
            text=[task] * len(images), images=images, return_tensors="pt", padding=True
        )
        out = self.model.generate(**inputs.to(self.model.device, self.model.dtype), **self.options)
        return self.processor.batch_decode(out, skip_special_tokens=False)

    def captions(self, images: list[Image.Image]) -> list[list[str]]:
        return [list(c) for c in zip(*(self.ask(images, task) for task in self.TASKS), strict=True)]

    def objects(self, images: list[Image.Image], captions: list[list[str]]) -> list[list[dict]]:
        return [parse_od(text) for text in self.ask(images, "<OD>")]


class Qwen:
    """Captions and things by Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923), one prompt a level; it
    gives no boxes here."""

    PROMPTS = (
        "Say in at most eight words what this photo shows.",
        "Describe this photo in one sentence: the main things, their kind and colour.",
        "Describe this photo in two or three sentences: things, kinds, colours, sizes, where "
        "each is, and the background.",
    )
    THINGS = (
        "List the things that are visible in this photo, most important first, one or two words "
        "each, separated by commas. Only the list."
    )

    def __init__(self, model, processor, max_new_tokens: int = 160):
        processor.tokenizer.padding_side = "left"  # answers begin where the prompts end
        self.model, self.processor, self.options = (
            model,
            processor,
            {"max_new_tokens": max_new_tokens, "do_sample": False},
        )

    @torch.no_grad()
    def ask(self, images: list[Image.Image], prompt: str) -> list[str]:
        turns = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": i}, {"type": "text", "text": prompt}],
                }
            ]
            for i in images
        ]
        inputs = self.processor.apply_chat_template(
            turns,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        out = self.model.generate(**inputs.to(self.model.device, self.model.dtype), **self.options)
        return self.processor.batch_decode(
            out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )

    def captions(self, images: list[Image.Image]) -> list[list[str]]:
        return [
            list(c)
            for c in zip(*(self.ask(images, prompt) for prompt in self.PROMPTS), strict=True)
        ]

    def objects(self, images: list[Image.Image], captions: list[list[str]]) -> list[list[dict]]:
        return [
            [{"tag": t} for t in unique(re.split(r"[,;\n]", text))]
            for text in self.ask(images, self.THINGS)
        ]


class GroundingDino:
    """Objects by Grounding DINO (Liu et al. 2023, arXiv 2303.05499): which of the captions' things
    it finds, and where."""

    def __init__(self, model, processor, threshold: float = 0.3, text_threshold: float = 0.25):
        self.model, self.processor, self.thresholds = (
            model,
            processor,
            {"threshold": threshold, "text_threshold": text_threshold},
        )

    @torch.no_grad()
    def objects(self, images: list[Image.Image], captions: list[list[str]]) -> list[list[dict]]:
        wanted = [phrases_of(c) or ["object"] for c in captions]
        inputs = self.processor(
            images=images, text=wanted, return_tensors="pt", padding=True, truncation=True
        )
        inputs = inputs.to(self.model.device, self.model.dtype)
        found = self.processor.post_process_grounded_object_detection(
            self.model(**inputs), inputs["input_ids"], **self.thresholds
        )
        return [self._objects(f) for f in found]

    @staticmethod
    def _objects(found: dict) -> list[dict]:
        """One picture's detections, surest first. A label that spans several phrases ("bird.
        grass.") is one object each."""
        out = []
        # Not strict: where nothing is found, transformers gives one empty label.
        rows = zip(
            found["scores"].tolist(), found["boxes"].tolist(), found["text_labels"], strict=False
        )
        for score, box, label in sorted(rows, key=lambda row: -row[0]):
            box = [min(1.0, max(0.0, x)) for x in box]
            out += [
                {"tag": t, "box": box, "score": round(score, 3)} for t in unique(label.split("."))
            ]
        return out


class Sam:
    """Masks of boxes by SAM (Kirillov et al. 2023, arXiv 2304.02643)."""

    def __init__(self, model, processor):
        self.model, self.processor = model, processor

    @torch.no_grad()
    def masks(self, image: Image.Image, objects: list[dict]) -> Tensor:
        """(h, w) uint8: 1 + the index of the object whose mask covers a pixel (the smallest, where
        several do), else 0."""
        out = torch.zeros(image.height, image.width, dtype=torch.uint8)
        boxed = [(i, o["box"]) for i, o in enumerate(objects[:255]) if "box" in o]
        if not boxed:
            return out
        scale = (image.width, image.height) * 2
        inputs = self.processor(
            image,
            input_boxes=[[[x * s for x, s in zip(b, scale, strict=True)] for _, b in boxed]],
            return_tensors="pt",
        )
        sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
        masks = self.model(
            **inputs.to(self.model.device, self.model.dtype), multimask_output=False
        ).pred_masks
        masks = self.processor.post_process_masks(masks.float().cpu(), *sizes)[0][:, 0]
        for i in masks.flatten(1).sum(1).argsort(descending=True).tolist():
            out[masks[i]] = boxed[i][0] + 1
        return out


def load(
    kind: str, name: str | Path | None = None, device: str | torch.device = "cpu"
) -> Florence | Qwen | GroundingDino | Sam:
    """A model of MODELS from a local folder or from the hub (`name`; None: the usual one), bfloat16
    on CUDA.

    Raises FileNotFoundError if the weights are neither there nor to be had, ValueError if they are
    of another class or incomplete; each says what to download and where to.
    """
    default, class_name, model_type = MODELS[kind]
    name = str(name or default)
    hint = (
        f"where there is network run `hf download {default} --local-dir DIR` and give DIR, or "
        f"add --download"
    )
    absent = (
        f"the weights of {kind} are not complete in {name} (no such folder, not in the hub's "
        f"cache, or a file is missing): {hint}"
    )
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as e:
        raise FileNotFoundError(absent) from e
    if config.model_type != model_type:
        raise ValueError(
            f"{name} holds a model of type {config.model_type}, {kind} needs {model_type}: {hint}"
        )
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    try:
        model, info = getattr(transformers, class_name).from_pretrained(
            name, dtype=dtype, output_loading_info=True
        )
        processor = transformers.AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as e:
        raise FileNotFoundError(absent) from e
    if info["missing_keys"]:
        keys = sorted(info["missing_keys"])
        raise ValueError(
            f"{name} lacks {len(keys)} tensors of {class_name} ({', '.join(keys[:3])}): it was "
            f"saved for another program; {hint}"
        )
    make = {
        "florence-2": Florence,
        "qwen2.5-vl": Qwen,
        "grounding-dino": GroundingDino,
        "sam": Sam,
    }[kind]
    return make(model.to(device).eval(), processor)
