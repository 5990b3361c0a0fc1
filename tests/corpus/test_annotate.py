"""Annotation with tiny random models of the real classes and real processors; what they would say
is written by hand."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from realsr_r1.cli import main
from realsr_r1.corpus import annotate, captioners, folders


def words_tokenizer(words, **special):
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", **special
    )


def both_sides(**options):
    """The options of an encoder and a decoder."""
    return {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in options.items()}


def make_florence():
    words = ["<s>", "<pad>", "</s>", "<unk>", "<image>", *(f"<loc_{i}>" for i in range(1000))]
    words += ["bird", "grass", "What", "the", "image"]
    tokenizer = words_tokenizer(
        words, bos_token="<s>", eos_token="</s>", extra_special_tokens={"image_token": "<image>"}
    )
    size = {"height": 32, "width": 32}
    images = transformers.CLIPImageProcessor(size=size, crop_size=size)
    images.image_seq_length = 17  # 4 x 4 places and their mean
    vision = {
        "depths": (1, 1),
        "patch_size": (7, 3),
        "patch_stride": (4, 2),
        "patch_padding": (3, 1),
        "patch_prenorm": (False, True),
        "embed_dim": (16, 32),
        "num_heads": (2, 2),
        "num_groups": (2, 2),
        "window_size": 4,
        "projection_dim": 32,
    }
    text = {
        "model_type": "bart",
        "vocab_size": len(words),
        "d_model": 32,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
        "max_position_embeddings": 512,
    } | both_sides(layers=1, attention_heads=2, ffn_dim=32)
    config = transformers.Florence2Config(vision_config=vision, text_config=text, image_token_id=4)
    model = transformers.Florence2ForConditionalGeneration(config)
    return model, transformers.Florence2Processor(images, tokenizer)


def make_qwen():
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    special = [f"<|{w}|>" for w in "im_start im_end image_pad video_pad".split()]
    special += ["<|vision_start|>", "<|vision_end|>"]
    words = ["<pad>", "<unk>", *special, "bird", "on", "grass"]
    tokenizer = words_tokenizer(words, eos_token="<|im_end|>", additional_special_tokens=special)
    template = (
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' "
        "%}<|vision_start|> <|image_pad|> <|vision_end|> "
        "{% else %}{{c.text}} {% endif %}{% endfor %}{% endfor %}<|im_start|>"
    )
    images = transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56)
    small = {"hidden_size": 32, "intermediate_size": 32}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    text = small | {
        "vocab_size": len(words),
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "rope_parameters": rope | {"type": "default"},
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    vision = {"depth": 1, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [0]}
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=small | vision, **{k: 4 + i for i, k in enumerate(ids)}
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(
        config
    ), transformers.Qwen2_5_VLProcessor(
        images, tokenizer, Qwen2VLVideoProcessor(), chat_template=template
    )


def make_dino():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "white", "bird", "grass"]
    tokenizer = transformers.BertTokenizerFast(vocab={w: i for i, w in enumerate(words)})
    size = {"shortest_edge": 64, "longest_edge": 96}
    swin = transformers.SwinConfig(
        image_size=64,
        embed_dim=16,
        depths=[1] * 4,
        num_heads=[1] * 4,
        window_size=2,
        out_features=["stage2", "stage3", "stage4"],
    )
    bert = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    small = both_sides(layers=2, attention_heads=2, ffn_dim=32, n_points=2)
    config = transformers.GroundingDinoConfig(
        backbone_config=swin, text_config=bert, d_model=32, num_queries=6, **small
    )
    return transformers.GroundingDinoForObjectDetection(
        config
    ), transformers.GroundingDinoProcessor(
        transformers.GroundingDinoImageProcessor(size=size), tokenizer
    )


def make_sam():
    small = {"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 16}
    sides = {"image_size": 64, "patch_size": 8}
    vision = {"output_channels": 16, "num_hidden_layers": 1, "window_size": 2, "num_pos_feats": 8}
    config = transformers.SamConfig(
        vision_config=small | sides | vision | {"global_attn_indexes": [0]},
        prompt_encoder_config=sides | {"hidden_size": 16, "mask_input_channels": 8},
        mask_decoder_config=small | {"iou_head_hidden_dim": 16},
    )
    images = transformers.SamImageProcessor(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}
    )
    return transformers.SamModel(config), transformers.SamProcessor(images)


MAKERS = {
    "florence-2": make_florence,
    "qwen2.5-vl": make_qwen,
    "grounding-dino": make_dino,
    "sam": make_sam,
}


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Folders of tiny models, each made when it is first asked for."""
    made, root = {}, tmp_path_factory.mktemp("weights")

    def folder(kind):
        if kind not in made:
            torch.manual_seed(0)
            for part in MAKERS[kind]():
                part.save_pretrained(root / kind)
            made[kind] = root / kind
        return made[kind]

    return folder


@pytest.fixture
def folder(tmp_path):
    where = tmp_path / "in"
    (where / "sub").mkdir(parents=True)
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 255, (30 + i, 40, 3), np.uint8)
        Image.fromarray(pixels).save(where / ("sub" if i > 2 else ".") / f"{i}.png")
    return where


ALL = ["0.png", "1.png", "2.png", "sub/3.png", "sub/4.png"]


class Scripted:
    """A captioner that says what it is told, and remembers how many photos it saw at a time."""

    def __init__(
        self,
        captions=("A bird.", "A white bird on grass.", "The image shows a white bird on grass."),
        room=100,
    ):
        self.said, self.room, self.batches = captions, room, []

    def captions(self, images):
        if len(images) > self.room:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")  # a CPU's words
        self.batches.append(len(images))
        return [list(self.said) for _ in images]

    def objects(self, images, captions):
        return [
            [{"tag": "Bird", "box": [0.1, 0.2, 1 / 3, 0.9]}, {"tag": "the grass"}, {"tag": "bird"}]
            for _ in images
        ]


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("</s><s>A bird sitting on a branch.</s><pad><pad>", "A bird sitting on a branch."),
        ("In this image we can see a bird. There is grass.", "A bird. There is grass."),
        ("The image is a photograph of a bird.", "A bird."),
        ("In this picture, I can see  two\nbirds.", "Two birds."),
        ("A bird on grass. Behind it is a tr", "A bird on grass."),  # cut off at the length limit
        ("A 2.5 m wall behind a bi", "A 2.5 m wall behind a bi"),  # the only sentence stays
        ("Imagery of birds", "Imagery of birds"),
        ("The image shows", "The image shows"),  # nothing would be left
        ("", ""),
    ],
)
def test_caption_clean_up(said, kept):
    assert captioners.clean_caption(said) == kept


def test_tags_are_clean_single_in_order_and_few():
    said = [
        "A Grass",
        "sea ##gull [SEP]",
        "the top of the tree",
        "grass",
        "the",
        "</s>",
        "T-shirt.",
    ]
    assert captioners.unique(said) == ["grass", "seagull", "tree", "t-shirt"]
    assert len(captioners.unique(f"thing {i}" for i in range(99))) == captioners.MOST_TAGS


def test_things_that_captions_name():
    assert captioners.phrases_of(
        ["A white bird on grass.", "a small white sea bird is standing, on the grass"]
    ) == ["white bird", "grass", "white sea bird"]
    assert captioners.phrases_of(["the image", ""]) == []


def test_florence_boxes_by_hand_and_like_the_librarys():
    text = (
        "</s><s>bird<loc_10><loc_20><loc_500><loc_999>green "
        "grass<loc_0><loc_0><loc_999><loc_999><loc_1><loc_2><loc_3><loc_4></s><pad>"
    )
    found = captioners.parse_od(text)
    assert [f["tag"] for f in found] == ["bird", "green grass", "green grass"]
    assert found[0]["box"] == [0.0105, 0.0205, 0.5005, 0.9995]
    assert found[2]["box"] == [0.0015, 0.0025, 0.0035, 0.0045]
    box = "<loc_1><loc_2><loc_3><loc_4>"
    for broken in ("bird", box, "bird<loc_1><loc_2><loc_3>", f"the{box}", ""):
        assert captioners.parse_od(broken) == []

    from transformers.models.florence2.processing_florence2 import Florence2PostProcessor

    tokenizer = type("T", (), {"all_special_tokens": []})
    theirs = Florence2PostProcessor({"description_with_bboxes": {}}, tokenizer)(
        text=text, image_size=(1000, 2000), parse_tasks="description_with_bboxes"
    )
    for a, b in zip(found, theirs["description_with_bboxes"], strict=True):
        scaled = [int(x * s) for x, s in zip(a["box"], (1000, 2000) * 2, strict=True)]
        assert (a["tag"], scaled) == (b["cat_name"], b["bbox"])


# ---------------------------------------------------------------- models


@pytest.fixture
def images():
    return [Image.new("RGB", (60, 40), "red"), Image.new("RGB", (50, 90), "blue")]


@pytest.mark.parametrize("kind", ["florence-2", "qwen2.5-vl"])
def test_captioners_answer_for_each_image_what_they_answer_alone(weights, images, kind):
    model = captioners.load(kind, weights(kind))
    model.options["max_new_tokens"] = 6
    both, alone = model.captions(images), model.captions(images[1:])
    assert [len(c) for c in both] == [3, 3] and both[1] == alone[0]
    objects = model.objects(images, both)
    assert len(objects) == 2 and all(o["tag"] for found in objects for o in found)


def test_florence_asks_for_three_levels_and_for_objects(weights, images, monkeypatch):
    model, asked = captioners.load("florence-2", weights("florence-2")), []
    box = "<loc_0><loc_0><loc_9><loc_9>"

    def ask(images, task):
        asked.append(task)
        return [f"</s><s>bird{box}</s>", "</s>"]

    monkeypatch.setattr(model, "ask", ask)
    model.captions(images)
    found = model.objects(images, [])
    assert asked == ["<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>", "<OD>"]
    assert found == [[{"tag": "bird", "box": [0.0005, 0.0005, 0.0095, 0.0095]}], []]


def test_qwen_reads_its_list_of_things(weights, images, monkeypatch):
    model = captioners.load("qwen2.5-vl", weights("qwen2.5-vl"))
    monkeypatch.setattr(
        model,
        "ask",
        lambda images, prompt: (
            ["A bird, green grass,\nbird.", ""] if prompt == model.THINGS else [prompt] * 2
        ),
    )
    assert model.objects(images, []) == [[{"tag": "bird"}, {"tag": "green grass"}], []]
    assert model.captions(images) == [list(model.PROMPTS)] * 2


def test_grounding_dino_finds_the_captions_things(weights, images):
    model = captioners.load("grounding-dino", weights("grounding-dino"))
    model.options = {"threshold": 0.0, "text_threshold": 0.0}
    captions = [["a white bird on grass"] * 3, ["grass"] * 3]
    found = model.objects(images, captions)
    assert [{o["tag"] for o in f} for f in found] == [{"white bird", "grass"}, {"grass"}]
    assert all(0 <= x <= 1 for f in found for o in f for x in o["box"])
    scores = [o["score"] for o in found[0]]
    assert scores == sorted(scores, reverse=True)
    model.options["threshold"] = 1.1
    assert model.objects(images, captions) == [[], []]
    assert model.objects(images, [["the image"]] * 2) == [[], []]  # captions that name nothing


def test_masks_hold_the_index_of_the_smallest_object(weights, images, monkeypatch):
    sam = captioners.load("sam", weights("sam"))
    bird = {"tag": "bird", "box": [0.1, 0.1, 0.5, 0.5]}
    objects = [bird, {"tag": "no box"}, {"tag": "grass", "box": [0.0, 0.5, 1.0, 1.0]}]
    mask = sam.masks(images[0], objects)
    assert mask.shape == (40, 60) and mask.dtype == torch.uint8
    assert set(mask.unique().tolist()) <= {0, 1, 3}

    drawn = torch.zeros(1, 2, 1, 40, 60, dtype=torch.bool)
    drawn[0, 0, 0, 10:20, 10:20] = True  # the bird, inside
    drawn[0, 1, 0, 5:40] = True  # the grass
    monkeypatch.setattr(type(sam.processor), "post_process_masks", lambda *_: list(drawn))
    mask = sam.masks(images[0], objects)
    assert (mask[15, 15], mask[30, 30], mask[0, 0]) == (1, 3, 0)
    assert int(sam.masks(images[0], [{"tag": "no box"}]).sum()) == 0


# ---------------------------------------------------------------- loading


def test_absent_wrong_and_incomplete_weights_say_what_to_do(weights, tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"weights of sam are not complete .* run `hf download facebook/sam-vit-base "
        r"--local-dir DIR`",
    ):
        captioners.load("sam")
    with pytest.raises(FileNotFoundError, match=r"not complete in .*nowhere"):
        captioners.load("florence-2", tmp_path / "nowhere")
    with pytest.raises(
        ValueError,
        match=r"holds a model of type sam, florence-2 needs florence2: .*Florence-2-base",
    ):
        captioners.load("florence-2", weights("sam"))
    model = transformers.SamModel.from_pretrained(weights("sam"))
    state = {k: v for k, v in model.state_dict().items() if "vision_encoder.layers" not in k}
    model.save_pretrained(tmp_path / "cut", state_dict=state)
    captioners.load("sam", weights("sam")).processor.save_pretrained(tmp_path / "cut")
    with pytest.raises(ValueError, match=r"lacks \d+ tensors of SamModel \(vision_encoder\.layers"):
        captioners.load("sam", tmp_path / "cut")


# ---------------------------------------------------------------- the run


def counts(new, known=0, left_out=0):
    return {"new": new, "known": known, "left out": left_out}


def test_lines_are_what_is_read_later(folder):
    assert annotate.annotate(folder, Scripted(), batch=2) == counts(5)
    lines = [
        json.loads(x) for x in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [x["file"] for x in lines] == ALL
    cleaned = ["A bird.", "A white bird on grass.", "A white bird on grass."]
    assert lines[0]["captions"] == cleaned and lines[0]["tags"] == ["bird", "grass"]
    assert lines[0]["objects"][0] == {"tag": "Bird", "box": [0.1, 0.2, 0.3333, 0.9]}
    assert list(folders.read_captions(folder).values()) == lines


def test_detail_grows_whatever_the_order():
    note = annotate.note_of("x", ["one two three four.", "One.", "one two."], [])
    assert note["captions"] == ["One.", "One two.", "One two three four."]
    with pytest.raises(ValueError, match="empty caption"):
        annotate.note_of("x", ["One.", "</s>", "one two."], [])


def test_a_killed_run_goes_on_and_mends_the_torn_line(folder):
    model = Scripted()
    assert annotate.annotate(folder, model, batch=2, limit=3) == counts(3)
    path = folder / "captions.jsonl"
    done = path.read_bytes()
    path.write_bytes(done + b'{"file": "sub/3.png", "capt')  # killed in the middle of a write
    assert annotate.annotate(folder, model, batch=2) == counts(2, known=3)
    assert path.read_bytes().startswith(done) and list(folders.read_captions(folder)) == ALL
    assert annotate.annotate(folder, model) == counts(0, known=5)
    assert model.batches == [2, 1, 2]


def test_processes_share_the_photos_and_know_each_others_work(folder):
    new = [annotate.annotate(folder, Scripted(), shard=(i, 2))["new"] for i in range(2)]
    assert new == [3, 2]
    names = sorted(p.name for p in folder.glob("captions*"))
    assert names == ["captions.0-of-2.jsonl", "captions.1-of-2.jsonl"]
    assert sorted(folders.read_captions(folder)) == ALL
    assert annotate.annotate(folder, Scripted()) == counts(0, known=5)  # another number of them
    assert annotate.shard_of("3/4") == (3, 4)
    with pytest.raises(ValueError, match=r"'1/1' is no share"):
        annotate.shard_of("1/1")


def test_photos_that_cannot_be_read_or_captioned_are_left_out_and_tried_again(folder, caplog):
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(b"broken")
    assert annotate.annotate(folder, Scripted()) == counts(4, left_out=1)
    assert "left out 1.png" in caplog.text
    (folder / "1.png").write_bytes(whole)
    mute = Scripted(captions=("", "", ""))
    assert annotate.annotate(folder, mute) == counts(0, known=4, left_out=1)
    assert "1.png: the model gave an empty caption" in caplog.text
    assert annotate.annotate(folder, Scripted())["new"] == 1


def test_a_limit_counts_what_was_noted(folder):
    for name in ALL[:2]:
        (folder / name).write_bytes(b"broken")
    assert annotate.annotate(folder, Scripted(), limit=2) == counts(2, left_out=2)
    assert annotate.annotate(folder, Scripted(), limit=2) == counts(1, known=2, left_out=2)


def test_too_little_memory_halves_the_batch(folder):
    model = Scripted(room=2)
    assert annotate.annotate(folder, model, batch=5)["new"] == 5 and model.batches == [2, 1, 2]
    (folder / "captions.jsonl").unlink()
    with pytest.raises(RuntimeError, match="can't allocate"):
        annotate.annotate(folder, Scripted(room=0))


def test_large_photos_are_shrunk_and_another_folder_takes_the_captions(tmp_path):
    seen = []

    class Wide(Scripted):
        def captions(self, images):
            seen.extend(i.size for i in images)
            return super().captions(images)

    (tmp_path / "wide").mkdir()
    Image.new("RGB", (2000, 500)).save(tmp_path / "wide" / "a.png")
    annotate.annotate(tmp_path / "wide", Wide(), tmp_path / "notes")
    assert seen == [(1024, 256)] and (tmp_path / "notes" / "captions.jsonl").exists()
    assert not (tmp_path / "wide" / "captions.jsonl").exists()


def test_captions_of_several_processes_and_broken_lines(tmp_path):
    def line(file, word):
        return json.dumps({"file": file, "captions": [word] * 3, "tags": []}) + "\n"

    (tmp_path / "captions.jsonl").write_text(line("a.png", "old"))
    (tmp_path / "captions.0-of-2.jsonl").write_text(line("a.png", "new") + line("b.png", "b"))
    torn = '{"file": "d.png", "capt'  # killed while writing
    (tmp_path / "captions.1-of-2.jsonl").write_text(line("c.png", "c") + torn)
    notes = folders.read_captions(tmp_path)
    found = {f: n["captions"][0] for f, n in notes.items()}
    assert found == {"a.png": "new", "b.png": "b", "c.png": "c"}
    assert folders.read_captions(tmp_path / "captions.jsonl")["a.png"]["captions"][0] == "old"
    (tmp_path / "captions.jsonl").write_text('{"file": "a.png"}\n' + line("b.png", "b"))
    with pytest.raises(ValueError, match=r"line 1 of captions\.jsonl is not"):
        folders.read_captions(tmp_path)
    assert folders.read_captions(tmp_path / "elsewhere") == {}


def test_command_line_with_all_models(folder, weights, capsys, tmp_path, monkeypatch):
    def ask(self, images, prompt):
        return ["A white bird on grass."] * len(images)

    monkeypatch.setattr(captioners.Qwen, "ask", ask)
    masks, where = tmp_path / "masks", str(folder)
    options = ["--model", "qwen2.5-vl", "--weights", str(weights("qwen2.5-vl"))]
    options += ["--tagger", "grounding-dino", "--tagger-weights", str(weights("grounding-dino"))]
    options += ["--device", "cpu", "--masks", str(masks), "--sam-weights", str(weights("sam"))]
    assert main(["annotate", where, *options, "--limit", "2", "--batch", "2"]) == 0
    said = capsys.readouterr().out
    assert "2 photos noted, 0 were noted before, 0 left out" in said and "2 masks drawn" in said
    assert main(["annotate", where, *options]) == 0
    said = capsys.readouterr().out
    assert "3 photos noted, 2 were noted before" in said and "3 masks drawn" in said
    mask = Image.open(masks / "sub" / "3.png.png")
    assert mask.mode == "L" and mask.size == Image.open(folder / "sub" / "3.png").size


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["IN"], "the weights of florence-2 are not complete in florence-community"),
        (["IN", "--masks", "IN/masks"], "would be taken for photos"),
        (["IN/none"], "is no folder with photos"),
        (["IN", "--shard", "4/4"], "'4/4' is no share"),
    ],
)
def test_command_line_says_what_to_do(folder, capsys, options, said):
    options = [o.replace("IN", str(folder)) for o in options]
    assert main(["annotate", *options, "--device", "cpu"]) == 2
    assert said in capsys.readouterr().err
