"""Pretrained models that caption photos and name what is in them, and the cleaning of what they
say.

Florence-2 has a task token for each level of detail, Qwen2.5-VL gets a prompt a level; Grounding
DINO finds the things that captions name, and SAM outlines them. The models and processors are
transformers' own; here is what to ask them, in batches, and what of the answer to keep. Run over a
folder they make `annotate`. Weights have licences of their own.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

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


class Model:
    """A network of transformers with its processor, and the options of its calls."""

    OPTIONS = {}

    def __init__(self, model, processor):
        self.model, self.processor, self.options = model, processor, dict(self.OPTIONS)

    def inputs(self, batch):
        """A processed batch on the network's device and in its precision."""
        return batch.to(self.model.device, self.model.dtype)


class Florence(Model):
    """Captions and objects by Florence-2 (Xiao et al. 2023, arXiv 2311.06242), one task token a
    question."""

    TASKS = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")
    OPTIONS = {"max_new_tokens": 256, "num_beams": 3, "do_sample": False}

    @torch.no_grad()
    def ask(self, images: list[Image.Image], task: str) -> list[str]:
        batch = self.processor(
            text=[task] * len(images), images=images, return_tensors="pt", padding=True
        )
        out = self.model.generate(**self.inputs(batch), **self.options)
        return self.processor.batch_decode(out, skip_special_tokens=False)

    def captions(self, images: list[Image.Image]) -> list[list[str]]:
        return [list(c) for c in zip(*(self.ask(images, t) for t in self.TASKS), strict=True)]

    def objects(self, images: list[Image.Image], captions: list[list[str]]) -> list[list[dict]]:
        return [parse_od(text) for text in self.ask(images, "<OD>")]


class Qwen(Model):
    """Captions and things by Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923), one prompt a level; it
    gives no boxes here."""

    PROMPTS = (
        "Say in at most eight words what this photo shows.",
        "Describe this photo in one sentence: the main things, their kind and color.",
        "Describe this photo in two or three sentences: things, kinds, colors, sizes, where each "
        "is, and the background.",
    )
    THINGS = (
        "List the things that are visible in this photo, most important first, one or two words "
        "each, separated by commas. Only the list."
    )
    OPTIONS = {"max_new_tokens": 160, "do_sample": False}

    def __init__(self, model, processor):
        super().__init__(model, processor)
        processor.tokenizer.padding_side = "left"  # answers begin where the prompts end

    @torch.no_grad()
    def ask(self, images: list[Image.Image], prompt: str) -> list[str]:
        text = {"type": "text", "text": prompt}
        turns = [
            [{"role": "user", "content": [{"type": "image", "image": i}, text]}] for i in images
        ]
        batch = self.processor.apply_chat_template(
            turns,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        out = self.model.generate(**self.inputs(batch), **self.options)
        answers = out[:, batch["input_ids"].shape[1] :]
        return self.processor.batch_decode(answers, skip_special_tokens=True)

    def captions(self, images: list[Image.Image]) -> list[list[str]]:
        return [list(c) for c in zip(*(self.ask(images, p) for p in self.PROMPTS), strict=True)]

    def objects(self, images: list[Image.Image], captions: list[list[str]]) -> list[list[dict]]:
        lists = [re.split(r"[,;\n]", text) for text in self.ask(images, self.THINGS)]
        return [[{"tag": t} for t in unique(things)] for things in lists]


class GroundingDino(Model):
    """Objects by Grounding DINO (Liu et al. 2023, arXiv 2303.05499): which of the captions' things
    it finds, and where."""

    OPTIONS = {"threshold": 0.3, "text_threshold": 0.25}

    @torch.no_grad()
    def objects(self, images: list[Image.Image], captions: list[list[str]]) -> list[list[dict]]:
        wanted = [phrases_of(c) or ["object"] for c in captions]
        batch = self.processor(
            images=images, text=wanted, return_tensors="pt", padding=True, truncation=True
        )
        batch = self.inputs(batch)
        found = self.processor.post_process_grounded_object_detection(
            self.model(**batch), batch["input_ids"], **self.options
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
            at = {"box": [min(1.0, max(0.0, x)) for x in box], "score": round(score, 3)}
            out += [{"tag": t} | at for t in unique(label.split("."))]
        return out


class Sam(Model):
    """Masks of boxes by SAM (Kirillov et al. 2023, arXiv 2304.02643)."""

    @torch.no_grad()
    def masks(self, image: Image.Image, objects: list[dict]) -> Tensor:
        """(h, w) uint8: 1 + the index of the object whose mask covers a pixel (the smallest, where
        several do), else 0."""
        out = torch.zeros(image.height, image.width, dtype=torch.uint8)
        boxed = [(i, o["box"]) for i, o in enumerate(objects[:255]) if "box" in o]
        if not boxed:
            return out
        scale = (image.width, image.height) * 2
        boxes = [[x * s for x, s in zip(box, scale, strict=True)] for _, box in boxed]
        batch = self.processor(image, input_boxes=[boxes], return_tensors="pt")
        sizes = batch.pop("original_sizes"), batch.pop("reshaped_input_sizes")
        masks = self.model(**self.inputs(batch), multimask_output=False).pred_masks
        masks = self.processor.post_process_masks(masks.float().cpu(), *sizes)[0][:, 0]
        for i in masks.flatten(1).sum(1).argsort(descending=True).tolist():
            out[masks[i]] = boxed[i][0] + 1
        return out


@dataclass
class Pair:
    """Captions by one model, objects by another: what `annotate` takes as one captioner."""

    captioner: Florence | Qwen
    tagger: GroundingDino

    def captions(self, images: list[Image.Image]) -> list[list[str]]:
        return self.captioner.captions(images)

    def objects(self, images: list[Image.Image], captions: list[list[str]]) -> list[list[dict]]:
        return self.tagger.objects(images, captions)


# Name on the command line → hub repository, model type and class in transformers, class here.
MODELS = {
    "florence-2": (
        "florence-community/Florence-2-base",
        "florence2",
        "Florence2ForConditionalGeneration",
        Florence,
    ),
    "qwen2.5-vl": (
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        Qwen,
    ),
    "grounding-dino": (
        "IDEA-Research/grounding-dino-tiny",
        "grounding-dino",
        "GroundingDinoForObjectDetection",
        GroundingDino,
    ),
    "sam": ("facebook/sam-vit-base", "sam", "SamModel", Sam),
}


def load(
    kind: str,
    name: str | Path | None = None,
    device: str | torch.device = "cpu",
    download: bool = False,
) -> Model:
    """A model of MODELS from a local folder or the hub's cache (`name`; None: the usual one), in
    bfloat16 on CUDA; nothing is fetched without `download`.

    Raises FileNotFoundError if the weights are not there or not to be had, ValueError if they are
    of another class or incomplete; each says what to download and where to."""
    hub, model_type, class_name, make = MODELS[kind]
    name, more = str(name or hub), {"local_files_only": not download}
    hint = f"run `hf download {hub} --local-dir DIR` and give DIR, or add --download"
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    try:
        config = transformers.AutoConfig.from_pretrained(name, **more)
        if config.model_type == model_type:
            model, info = getattr(transformers, class_name).from_pretrained(
                name, dtype=dtype, output_loading_info=True, **more
            )
            processor = transformers.AutoProcessor.from_pretrained(name, **more)
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as e:
        raise FileNotFoundError(
            f"the weights of {kind} are not complete in {name} (no such folder, not in the hub's "
            f"cache, or a file is missing or damaged): where there is network {hint}"
        ) from e
    if config.model_type != model_type:
        raise ValueError(
            f"{name} holds a model of type {config.model_type}, {kind} needs {model_type}: {hint}"
        )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{name} lacks {len(missing)} tensors of {class_name} ({', '.join(missing[:3])}): it "
            f"was saved for another program; {hint}"
        )
    return make(model.to(device).eval(), processor)
