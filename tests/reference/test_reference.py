"""A tiny Chameleon with the real vocabulary, saved as the hub's checkpoints are: old-style
configuration, one row of norms."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import ChameleonForConditionalGeneration, PreTrainedTokenizerFast

from realsr_r1 import images, vlcot
from realsr_r1.cli import main
from realsr_r1.reference import chameleon as C
from realsr_r1.reference import llamagen
from realsr_r1.reference import restoring as R
from realsr_r1.reference.llamagen import LlamaGen, LlamaGenConfig
from realsr_r1.sampling import Sampling

VOCAB = 73_728
VQ = {
    "base_channels": 32,
    "channel_multiplier": [1],
    "num_res_blocks": 1,
    "embed_dim": 8,
    "num_embeddings": 16,
    "latent_channels": 32,
}
CONFIG = {
    "architectures": ["ChameleonForConditionalGeneration"],
    "model_type": "chameleon",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rope_theta": 25000.0,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "mask_image_logits": False,
    "dropout": 0.05,
    "swin_norm": False,
    "vq_config": VQ,
}


def all_names():
    """Every id's name: the published ones, 256 bytes for text (any text then comes back exactly),
    fillers."""
    names = C.published_names() | {"</s>": 2, "<unk>": 3, "<image>": 8711}
    taken = set(names.values())
    letters = [b for b in sorted(pre_tokenizers.ByteLevel.alphabet()) if b not in names]
    names |= dict(zip(letters, (i for i in range(20_000, 65_536) if i not in taken), strict=False))
    taken = set(names.values())
    return names | {f"<unused{i}>": i for i in range(VOCAB) if i not in taken}


def tokenizer(names):
    inner = Tokenizer(models.BPE(names, []))
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    inner.add_special_tokens([AddedToken(t) for t in (*C.PUBLISHED_IDS, "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=C.BOS, eos_token="</s>", pad_token=C.PAD
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hub") / "tiny-pure"
    path.mkdir()
    names = all_names()
    config = CONFIG | {"vocabulary_map": names}
    (path / "config.json").write_text(json.dumps(config))
    tokenizer(names).save_pretrained(path)
    torch.manual_seed(0)
    model = ChameleonForConditionalGeneration(C.ChameleonConfig.from_pretrained(path))
    state = {
        k: v[:1].contiguous() if re.search(r"[qk]_norm", k) else v.contiguous()
        for k, v in model.state_dict().items()
    }
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def model(folder):
    return C.load(folder, "cpu", bits=32)


@pytest.fixture
def scripted(folder):
    """Without attention and MLP the next word depends on the last alone, so that its embedding can
    say what it is."""
    model = C.load(folder, "cpu", bits=32)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()

    def follow(pairs):
        for a, b in pairs:
            model.lm_head.weight.data[b] = 10 * torch.nn.functional.normalize(
                model.model.embed_tokens.weight.data[a], dim=0
            )

    return model, follow


def chain(sizes=(4, 8, 12), codes=16_384):
    g = torch.Generator().manual_seed(1)
    a, b, c = (torch.randint(0, codes, (n, n), generator=g) for n in sizes)
    return vlcot.Chain(
        "medium blur, downsample, heavy noise",
        "a bird on grass",
        a,
        "a white bird, 2 trees",
        b,
        "größer: a bird (left)",
        c,
    )


def same(a, b):
    return all(
        torch.equal(x, y) if isinstance(x := getattr(a, t), torch.Tensor) else x == y
        for t in vlcot.TAGS
        for y in (getattr(b, t),)
    )


def test_vocabulary_map_as_published():
    layout = C.Layout.of(C.published_names(), VOCAB)
    assert layout.codes == 16_384 and layout.factor == 8 and layout.unit == 4
    assert layout.code_ids[[0, 8191, 8192, 16383]].tolist() == [4, 8195, 65536, 73727]
    assert (
        layout.names[C.END],
        layout.names[C.START],
        layout.names[C.TURN],
        layout.names[C.ROW],
    ) == (8196, 8197, 8710, 8803)
    assert layout.names[C.size_name(16)] == 8804 + 16 and layout.sizes[8804 + 16] == 64
    assert C.code_name(17) == "IMGIMGBHZ" and C.code_name(8191) == "IMGIMGIBJBZ"
    assert layout.code_of[[4, 65536, 8196, 9000]].tolist() == [0, 8192, -1, -1]


def test_the_checkpoints_own_names_decide():
    swapped = C.published_names()
    swapped[C.code_name(0)], swapped[C.code_name(9)] = 13, 4
    assert C.Layout.of(swapped, VOCAB).code_ids[[0, 9]].tolist() == [13, 4]
    half = {n: i for n, i in C.published_names().items() if not n.startswith("IMGIMG") or i < 9000}
    assert (
        C.Layout.of(half, 65_536).codes == 8192 and C.Layout.of(half, 65_536).unit == 2
    )  # Lumina-mGPT: 16 pixels a code
    assert C.Layout.of(half, VOCAB).code_ids[8192] == 65_536  # PURE's extension, unnamed


def test_another_vocabulary_is_refused():
    names = C.published_names()
    with pytest.raises(ValueError, match="lacks <eoss>"):
        C.Layout.of({n: i for n, i in names.items() if n != C.END}, VOCAB)
    with pytest.raises(ValueError, match="names 16383 image codes"):
        C.Layout.of({n: i for n, i in names.items() if n != C.code_name(5)}, VOCAB)
    with pytest.raises(ValueError, match="another vocabulary"):
        C.Layout.of(names, 65_536)


@pytest.mark.parametrize("pixels, tokens", [(128, 276), (256, 1060), (512, 4164)])
def test_image_tokens_as_published(model, pixels, tokens):
    codes = torch.arange((pixels // 8) ** 2).reshape(pixels // 8, -1)
    ids = model.layout.image_ids(codes)
    assert len(ids) == tokens == R.image_tokens(pixels)
    assert ids[:3] == [8197, 8804 + pixels // 32, 8804 + pixels // 32] and ids[-1] == 8196
    rows = torch.tensor(ids[3:-1]).reshape(pixels // 8, -1)
    assert (rows[:, -1] == 8803).all() and torch.equal(model.layout.code_of[rows[:, :-1]], codes)


def test_image_sides_must_have_a_size_token(model):
    with pytest.raises(ValueError, match="multiples of 32 pixels"):
        model.layout.image_ids(torch.zeros(4, 6, dtype=torch.long))


def test_render_then_parse_gives_the_chain_back(model):
    ids = R.render(chain(), model)
    assert same(R.parse(ids, model), chain()) and vlcot.well_formed(R.text_of(ids, model))
    assert ids[-1] == 8710 and (ids == 8197).sum() == 3
    assert (
        len(ids)
        == sum(len(f"<{t}></{t}>") for t in vlcot.TAGS)
        + 36
        + 15
        + 21
        + len("größer: a bird (left)".encode())
        + 24
        + 76
        + 160
        + 1
    )


def test_a_cut_or_mislaid_image_is_not_read(model):
    ids = R.render(chain(), model).tolist()
    last = len(ids) - 1 - ids[::-1].index(8197)
    cut = R.parse(ids[: last + 50], model)
    assert cut.final_image is None and cut.middle_image is not None
    assert (
        R.final_codes(R.text_of(ids[: last + 50], model)) is None
    )  # the middle image does not stand in
    huge = [8197, 8805, 8805, *[4] * 132**2, 8196]  # more than the largest size token says
    assert R.final_codes(R.text_of(huge, model)) is None
    assert R.final_codes(R.text_of([8197, 8196], model)) is None
    shifted = ids.copy()
    shifted[last + 1] = 8804 + 2  # says 64 pixels high, holds 96
    assert R.parse(shifted, model).final_image is None
    assert R.final_codes(R.text_of(ids, model)).shape == (12, 12)


def test_without_tags_the_last_image_answers(model):
    a, b = chain().rough_image, chain().middle_image
    ids = [
        *model.words.encode("a bird"),
        *model.layout.image_ids(a),
        *model.layout.image_ids(b),
        8710,
    ]
    assert torch.equal(R.final_codes(R.text_of(ids, model)), b)
    assert R.final_codes(R.text_of(ids[:-5], model)) is None and R.final_codes("a bird") is None


def test_prompt_layout(model):
    prompt = R.prompt_ids(model, torch.zeros(2, 8, 8, dtype=torch.long))
    assert prompt.shape == (2, 1 + len(R.PROMPT) + 1 + 76 + 1)
    assert prompt[0, 0] == 0 and prompt[0, -1] == 8710 and prompt[0, -2] == 8196
    assert model.words.decode(prompt[0, 1 : len(R.PROMPT) + 2]) == R.PROMPT + " "


def test_keys_are_the_published_ones(model, folder):
    """Names from the conversion script in Lumina-mGPT's repository
    (convert_chameleon_weights_to_hf.py)."""
    parts = [f"self_attn.{p}_proj.weight" for p in "qkvo"] + [
        f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")
    ]
    parts += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    parts += [f"self_attn.{n}_norm.{p}" for n in "qk" for p in ("weight", "bias")]
    keys = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} | {
        f"model.layers.{i}.{p}" for i in range(2) for p in parts
    }
    assert set(model.state_dict()) == keys
    stored = load_file(folder / "model.safetensors")
    assert keys < set(stored) and any(k.startswith("model.vqmodel.encoder") for k in stored)
    assert all(torch.equal(v, stored[k]) for k, v in model.state_dict().items())


def test_logits_are_transformers_own_but_for_the_mask(model, folder):
    ids = torch.tensor([[0, 9000, 8197, 8805, 8805, 4, 65_540]])
    theirs = ChameleonForConditionalGeneration(C.ChameleonConfig.from_pretrained(folder))
    state = load_file(folder / "model.safetensors")
    theirs.load_state_dict({k: v.expand_as(theirs.state_dict()[k]) for k, v in state.items()})
    with torch.no_grad():
        a, b = model(ids, labels=ids), theirs.eval()(ids)
    image = torch.zeros(VOCAB, dtype=torch.bool)
    image[model.layout.code_ids] = True
    assert torch.allclose(a.logits[..., ~image], b.logits[..., ~image], atol=1e-5)
    assert (b.logits[..., image] < -1e30).all() and a.logits[..., image].abs().max() < 100
    expected = torch.nn.functional.cross_entropy(a.logits[0, :-1], ids[0, 1:])
    assert abs(a.loss - expected) < 1e-4 and model(ids, logits_to_keep=2).logits.shape == (
        1,
        2,
        VOCAB,
    )


def run(grammar, ids):
    """Feed ids to the grammar; the kinds it offered, one a word."""
    grammar.start(1)
    kinds = []
    for i in ids:
        kinds.append(grammar.kind().item())
        assert grammar.masks[kinds[-1], i], f"{i} is barred"
        grammar.step(torch.tensor([i]))
    return kinds


def test_grammar_admits_a_chain_and_bars_everything_else(model):
    ids = R.render(chain((4, 8, 12)), model).tolist()
    for sizes in (None, (32, 64, 96)):
        kinds = run(R.Grammar(model.layout, sizes), ids)
        assert (
            kinds.count(R.CODE) == 16 + 64 + 144
            and kinds.count(R.ROW_END) == 24
            and kinds.count(R.IMAGE_END) == 3
        )
        text = R.TEXT if sizes is None else R.LAST_TEXT
        assert kinds[-1] == text
    masks = R.Grammar(model.layout, (32,)).masks
    assert masks.sum(1).tolist()[2:] == [32, 16_384, 1, 1, 1] and masks[R.FORCED, 8805]
    free = masks[R.TEXT]
    assert (
        free[8197]
        and free[8710]
        and not masks[R.LAST_TEXT, 8197]
        and not free[[4, 65_536, 8196, 8803, 8810, 1, 0]].any()
    )


def test_grammar_moves_rows_on_their_own(model):
    g = R.Grammar(model.layout)
    g.start(2)
    for words in ([8197, 9000], [8805, 8197], [8805, 8805], [4, 8806], [5, 4]):
        g.step(torch.tensor(words))
    assert (
        g.kind().tolist() == [R.CODE, R.CODE] and g.w.tolist() == [4, 8] and g.h.tolist() == [4, 4]
    )
    for _ in range(2):
        g.step(torch.tensor([6, 6]))
    assert g.kind().tolist() == [R.ROW_END, R.CODE]
    with pytest.raises(ValueError, match="multiple of 32"):
        R.Grammar(model.layout, (100,))


def test_text_is_free_of_codes_and_greedy_or_seeded(model):
    prompts = torch.tensor([[0, 9000, 8710], [0, 9001, 8710]])
    for how in (R.PURE, Sampling.rollout()):
        ids = R.generate(
            model, prompts, how, torch.Generator().manual_seed(0), sizes=(32,), max_new=12
        )
        assert ids.shape == (2, 12) and not (model.layout.code_of[ids] >= 0).any()
    again = [
        R.generate(model, prompts, Sampling.rollout(), torch.Generator().manual_seed(s), (32,), 12)
        for s in (1, 1, 2)
    ]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])
    greedy = [
        R.generate(model, prompts, R.PURE, torch.Generator().manual_seed(s), max_new=6)
        for s in (1, 2)
    ]
    assert torch.equal(*greedy)  # text is greedy


@pytest.mark.parametrize("window", [0, 8])
def test_a_scripted_model_draws_its_image_and_ends(scripted, window):
    model, follow = scripted
    follow([(8710, 9000), (9000, 8197), (8196, 9001), (9001, 8710)])
    ids = R.generate(
        model,
        torch.tensor([[0, 8710]]),
        R.PURE,
        torch.Generator().manual_seed(0),
        sizes=(64,),
        max_new=200,
        window=window,
    )[0]
    assert (
        ids[:4].tolist() == [9000, 8197, 8806, 8806]
        and ids[-3:].tolist() == [8196, 9001, 8710]
        and len(ids) == 1 + 76 + 2
    )
    assert R.final_codes(R.text_of(ids, model)).shape == (8, 8)
    short = R.generate(model, torch.tensor([[0, 8710]]), sizes=(64,), max_new=20, window=window)[0]
    assert len(short) <= 20 and R.final_codes(R.text_of(short, model)) is None


def test_rows_of_a_batch_that_end_early_are_padded(scripted):
    model, follow = scripted
    follow([(9000, 8197), (8196, 8710), (9100, 8710)])
    ids = R.generate(
        model,
        torch.tensor([[0, 9000], [0, 9100]]),
        R.PURE,
        torch.Generator().manual_seed(0),
        (32,),
        60,
    )
    assert ids.shape == (2, 25) and ids[1].tolist() == [8710] + [1] * 24 and ids[0, -1] == 8710


def test_guidance_reads_each_image_from_its_start(model):
    """The second reading of rows that begin images at different words equals a fresh forward pass
    over the image alone."""
    free = R.ImageOnly(model)
    rows = torch.tensor([[9000, 8197, 8805, 8805, 7, 8], [8197, 8805, 8805, 9, 10, 11]])
    with torch.no_grad():
        for i, word in enumerate(rows.T):
            got = free.logits(word, word == 8197, torch.tensor([i >= 1, True]))
        for r, first in ((0, 1), (1, 0)):
            expected = model(rows[r : r + 1, first:]).logits[0, -1]
            assert torch.allclose(got[r], expected, atol=1e-4)
    assert (
        free.logits(rows[:, 0], rows[:, 0] == 0, torch.tensor([False, False])) is None
        and free.cache is None
    )


def test_the_processor_mixes_both_readings(model, monkeypatch):
    """The distribution of one code, by hand: guidance, then the grammar, then top-k, then the
    temperature."""
    prompt, start = torch.tensor([[0, 9000, 8710]]), torch.tensor([[8197, 8805, 8805]])
    with torch.no_grad():
        conditional, alone = (
            model(x).logits[0, -1] for x in (torch.cat([prompt, start], 1), start)
        )
    codes = model.layout.code_ids
    mixed = (alone + 3 * (conditional - alone))[codes]
    drawn, real = [], R.choose
    monkeypatch.setattr(R, "choose", lambda scores, u: drawn.append(scores) or real(scores, u))
    how = Sampling(image_temperature=0.5, guidance=3.0, entropy_top_k=False)
    grammar, g = R.Grammar(model.layout), torch.Generator().manual_seed(0)
    processor, ids = R.Interleaved(model, grammar, how, g), prompt
    for word in start[0]:
        processor(ids, torch.zeros(1, VOCAB))
        ids = torch.cat([ids, word[None, None]], 1)
    chosen = processor(ids, conditional[None])
    assert len(drawn) == 1  # text is greedy, so the code alone was drawn
    probability = torch.zeros(VOCAB).scatter(0, processor.grammar.columns, drawn[0].softmax(-1)[0])
    assert torch.allclose(probability[codes], (mixed / 0.5).softmax(0), atol=1e-4)
    assert chosen.argmax().item() in codes.tolist() and torch.isfinite(chosen).sum() == 1


def test_speculative_decoding_needs_sizes_and_one_row(model):
    with pytest.raises(ValueError, match="needs the images' sizes"):
        R.generate(model, torch.tensor([[0, 8710]]), window=4)


def test_memory_estimate_by_hand(folder, monkeypatch):
    config = C.ChameleonConfig(
        vocab_size=VOCAB, vocabulary_map={}
    )  # 7B: 32 layers of 4·4096² + 3·4096·11008, and two tables
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert C.needed_bytes(config, 16, 0) == 2 * (weights + 2 * VOCAB * 4096)
    assert C.needed_bytes(config, 4, 0) == weights // 2 + 2 * 2 * VOCAB * 4096
    assert C.needed_bytes(config, 32, 9) == 2 * C.needed_bytes(config, 16, 9)  # the cache, too
    assert (
        C.needed_bytes(config, 16, 1000, 3) - C.needed_bytes(config, 16, 0)
        == 3000 * 32 * 2 * 4096 * 2
    )
    monkeypatch.setattr(C.cost, "free_bytes", lambda device: 1_000)
    with pytest.raises(RuntimeError, match=r"has 0\.0 GB free: take --bits 8"):
        C.load(folder, "cpu")


def test_bfloat16_is_the_default_and_the_stored_norms_are_kept(folder):
    model = C.load(folder, "cpu")
    assert model.dtype == torch.bfloat16 and model.config.qk_norm_rows == 1 and not model.training
    assert model.model.layers[0].self_attn.q_norm.weight.shape == (1, 16)
    assert (
        model.config.rope_parameters["rope_theta"] == 25_000
    )  # old configurations have it at the top


def test_its_own_save_loads_again(folder, tmp_path):
    model = C.load(folder, "cpu", bits=32)
    model.save_pretrained(tmp_path / "own")
    model.words.save_pretrained(tmp_path / "own")
    back = C.load(tmp_path / "own", "cpu", bits=32)
    ids = torch.tensor([[0, 9000, 8197]])
    with torch.no_grad():
        assert torch.equal(back(ids).logits, model(ids).logits)


@pytest.fixture
def damaged(folder, tmp_path):
    """A copy of the folder to be spoilt: `damaged(config=…, state=…)`."""

    def make(config=None, state=None):
        for path in folder.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        if config:
            (tmp_path / "config.json").write_text(
                json.dumps(
                    json.loads((folder / "config.json").read_text(encoding="utf-8")) | config
                )
            )
        if state:
            tensors = load_file(folder / "model.safetensors")
            state(tensors)
            save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return make


def test_wrong_class(damaged):
    with pytest.raises(ValueError, match="class 'llama', not Chameleon"):
        C.load(damaged({"model_type": "llama"}), "cpu")


def test_missing_keys(damaged):
    with pytest.raises(ValueError, match=r"lack 1 tensors, first model\.layers\.1\.mlp\.up_proj"):
        C.load(damaged(state=lambda s: s.pop("model.layers.1.mlp.up_proj.weight")), "cpu")


def test_a_configuration_without_names_takes_the_tokenizers(damaged):
    model = C.load(damaged({"vocabulary_map": None}), "cpu")
    assert model.layout.codes == 16_384 and R.generate(
        model, torch.tensor([[0, 8710]]), max_new=2
    ).shape == (1, 2)


def test_wrong_shape(damaged):
    with pytest.raises(ValueError, match="do not fit their configuration"):
        C.load(damaged({"intermediate_size": 64}), "cpu")


def test_sharded_norms_are_refused(damaged):
    def shard(state):
        for key in [k for k in state if "_norm." in k and "self_attn" in k]:
            state[key] = state[key].repeat(4, 1)

    with pytest.raises(ValueError, match="in 4 shards"):
        C.load(damaged(state=shard), "cpu")


def test_cut_or_absent_weights(damaged):
    path = damaged()
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut short or damaged"):
        C.load(path, "cpu")
    (path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors weights"):
        C.load(path, "cpu")
    (path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        C.load(path, "cpu")


def test_no_network_no_gpu_no_bitsandbytes(folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match="neither a folder here nor to be had"):
        C.load("nobody/not-a-model", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch finds none here"):
        C.load(folder, "cuda")
    monkeypatch.setattr(C.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="need the bitsandbytes package"):
        C.load(folder, "cpu", bits=4)
    with pytest.raises(ValueError, match="3 bits are not offered"):
        C.load(folder, "cpu", bits=3)


@pytest.fixture
def small(scripted, monkeypatch):
    """Tiles of 16 LR pixels instead of 128, the scripted model (one image of 64 pixels), a random
    LlamaGen-shaped tokenizer."""
    model, follow = scripted
    follow([(8710, 8197), (8196, 8710)])
    torch.manual_seed(0)
    vq = LlamaGen(LlamaGenConfig(base=32, multiplier=(1, 1, 1, 1), res_blocks=1, latent=32)).eval()
    monkeypatch.setattr(R, "TILE", 16)
    monkeypatch.setattr(R, "STRIDE", 12)
    return R.Reference(model, vq)


def photo(w, h, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8))


def restored(picture, small, sizes=(64,), **options):
    return R.restore_reference(picture, small, sizes=sizes, max_new=100, **options)


def test_restore_tiles_a_photo(small):
    out = restored(photo(20, 10), small, seed=3, batch=2)
    assert out.image.size == (80, 40) and out.complete and out.settings["bicubic_tiles"] == 0
    assert [(t.x, t.y) for t in out.tiles] == [(0, 0), (4, 0)]
    assert all(t.chain.final_image.shape == (8, 8) for t in out.tiles)
    json.dumps(out.trace)
    again, other = (restored(photo(20, 10), small, seed=s, batch=2).image for s in (3, 4))
    assert np.array_equal(out.image, again) and not np.array_equal(out.image, other)


def test_the_photo_keeps_its_alpha(small, tmp_path):
    picture = photo(16, 16).convert("RGBA")
    picture.paste((0, 0, 0, 0), (0, 0, 8, 16))
    out = restored(picture, small)
    out.save(tmp_path / "x.png")
    alpha = Image.open(tmp_path / "x.png").getchannel("A")
    assert (alpha.getpixel((4, 30)), alpha.getpixel((60, 30))) == (0, 255)


def test_colors_come_from_the_photo(small):
    out = restored(Image.new("RGB", (16, 16), (90, 120, 60)), small, window=8).image
    assert np.abs(np.asarray(out, float).mean((0, 1)) - (90, 120, 60)).max() < 6


def test_a_tile_without_a_final_image_of_its_size_stays_bicubic(small):
    picture = photo(16, 16)
    out = restored(picture, small, sizes=(32,))  # 32 pixels are no tile's size
    assert out.complete and out.settings["bicubic_tiles"] == len(out.tiles) == 1
    want = np.asarray(images.to_image(bicubic(picture)), float)
    assert np.abs(np.asarray(out.image, float) - want).max() <= 1


def bicubic(picture):
    up = torch.nn.functional.interpolate(
        images.to_tensor(picture)[None], scale_factor=4, mode="bicubic", align_corners=False
    )
    return up[0].clamp(0, 1)


def test_little_memory_and_ctrl_c(small, monkeypatch):
    real, seen = R.restore_tiles, []

    def flaky(reference, up, *a, **k):
        seen.append(len(up))
        if len(up) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if len(seen) > 2:
            raise KeyboardInterrupt
        return real(reference, up, *a, **k)

    monkeypatch.setattr(R, "restore_tiles", flaky)
    out = restored(photo(20, 10), small, batch=2)
    assert seen == [2, 1, 1] and not out.complete and len(out.tiles) == 1
    with pytest.raises(ValueError, match="scale it down, or allow larger photos"):
        restored(photo(20, 10), small, max_pixels=100)


def test_tokenizer_and_model_must_belong_together(folder, monkeypatch):
    vq = LlamaGen(LlamaGenConfig(64, base=32, multiplier=(1, 1, 1, 1), res_blocks=1, latent=32))
    monkeypatch.setattr(R, "load_llamagen", lambda path: vq)
    with pytest.raises(ValueError, match="64 codes of 8 pixels and the model 16384 of 8"):
        R.load_reference(folder, device="cpu")


def test_command_line(small, tmp_path, monkeypatch, capsys):
    photo(16, 16).save(tmp_path / "x.png")
    asked = {}

    def load(name, tokenizer, **options):
        asked.update(name=name, tokenizer=tokenizer, **options)
        return small

    monkeypatch.setattr(R, "load_reference", load)
    line = f"reference {tmp_path / 'x.png'} --weights some/model --sizes 64 --device cpu --bits 8"
    out, trace = tmp_path / "y.png", tmp_path / "t.json"
    assert main([*line.split(), "-o", str(out), "--trace", str(trace), "--window", "4"]) == 0
    settings = json.loads(trace.read_text(encoding="utf-8"))["settings"]
    assert images.read(out).image.size == (64, 64) and settings["window"] == 4
    options = {"device": "cpu", "bits": 8, "batch": 1}
    assert asked == {"name": "some/model", "tokenizer": None} | options
    assert "bicubic" not in capsys.readouterr().out
    with monkeypatch.context() as m:
        m.setattr(R, "final_codes", lambda text: None)  # a model that breaks off
        assert main([*line.split(), "-o", str(out)]) == 0
    assert "1 of 1 tiles are bicubic" in capsys.readouterr().out
    assert main([*line.split(), "-o", str(tmp_path / "no" / "y.png")]) == 2
    assert "does not exist: create it first" in capsys.readouterr().err
    asked.clear()
    line = f"reference {tmp_path / 'x.png'} -o {out} --window 4"
    assert main(line.split()) == 2 and not asked
    assert "--window needs --sizes" in capsys.readouterr().err
    for wrong, said in (
        ("--sizes 64 128", "the last of them 64"),
        ("--sizes 20 64", "multiples of 32"),
        ("--max-megapixels 0.0001", "allow larger photos"),
    ):
        line = f"reference {tmp_path / 'x.png'} -o {out} {wrong}"
        assert main(line.split()) == 2 and not asked  # before 14 GB are read
        assert said in capsys.readouterr().err


TINY = LlamaGenConfig(codes=32, base=32, multiplier=(1, 2), res_blocks=1, latent=32)


def as_llamagen(model):
    """A state dict with the names of LlamaGen's published checkpoints."""
    names = {"block": "res", "block_1": "0", "attn_1": "1", "block_2": "2"}
    theirs = {"quantize.codebook_used": torch.zeros(4)}
    for key, value in model.state_dict().items():
        p = key.split(".")
        if p[1:2] in (["down"], ["up"]):
            p[1], p[3] = "conv_blocks", names.get(p[3], p[3])
        elif p[1:2] == ["mid"]:
            p[2] = names[p[2]]
        theirs[".".join(p).replace("quantize.weight", "quantize.embedding.weight")] = value.clone()
    return theirs


def test_llamagen_layout_loads_key_by_key():
    ours = LlamaGen(TINY).eval()
    theirs = as_llamagen(ours)
    # Names as in LlamaGen's published state dict.
    for known in (
        "encoder.conv_blocks.0.res.0.conv1.weight",
        "encoder.conv_blocks.0.downsample.conv.weight",
        "encoder.mid.1.q.weight",
        "decoder.conv_blocks.0.attn.0.proj_out.bias",
        "decoder.conv_blocks.0.upsample.conv.weight",
        "quant_conv.weight",
        "quantize.embedding.weight",
    ):
        assert known in theirs
    loaded = llamagen.load_llamagen({"model": theirs}, TINY)
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(loaded.encode(x), ours.encode(x)) and torch.allclose(
        loaded.decode(ours.encode(x)), ours.decode(ours.encode(x)), atol=1e-5
    )


def test_llamagen_key_report_names_each_kind_in_one_message():
    theirs = as_llamagen(LlamaGen(TINY))
    theirs.pop("encoder.mid.1.q.weight")
    theirs["encoder.mid.1.wrong"] = torch.zeros(1)
    theirs["quantize.embedding.weight"] = torch.zeros(16, 8)
    with pytest.raises(ValueError) as e:
        llamagen.load_llamagen(theirs, TINY)
    assert str(e.value) == (
        "this is not LlamaGen's state dict for 2 levels: 1 missing "
        "['encoder.mid.attn_1.q.weight']; "
        "1 unexpected ['encoder.mid.attn_1.wrong']; 1 wrongly shaped ['quantize.weight (16, 8) "
        "instead of (32, 8)']"
    )
    theirs.pop("quantize.embedding.weight")  # no codebook at all
    with pytest.raises(
        ValueError, match=r"2 missing \['encoder.mid.attn_1.q.weight', 'quantize.weight'\]"
    ):
        llamagen.load_llamagen(theirs, TINY)


def test_a_damaged_llamagen_file(tmp_path):
    path = tmp_path / "vq_tiny.pt"
    theirs = as_llamagen(LlamaGen(TINY))
    torch.save({"model": theirs, "steps": 3}, path)
    llamagen.load_llamagen(str(path), TINY)
    whole = path.read_bytes()
    for broken in (whole[:2000], b"not a checkpoint", b""):
        path.write_bytes(broken)
        with pytest.raises(
            ValueError, match="is not a torch checkpoint of tensors, or is cut short"
        ):
            llamagen.load_llamagen(path, TINY)


def test_llamagen_number_of_levels_is_read_from_the_names(monkeypatch):
    for name, levels in (("DS8", 4), ("DS16", 5)):
        config = LlamaGenConfig(
            codes=16, base=32, multiplier=(1,) * levels, res_blocks=1, latent=32
        )
        monkeypatch.setattr(llamagen, name, config)
        assert llamagen.load_llamagen(as_llamagen(LlamaGen(config))).factor == 2 ** (levels - 1)


def test_llamagen_without_file_and_network_says_what_to_run(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def offline(repo, name):
        asked.append((repo, name))
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        FileNotFoundError,
        match=r"run `hf download FoundationVision/LlamaGen vq_ds16_c2i\.pt --local-dir \.`",
    ):
        llamagen.load_llamagen("vq_ds16_c2i.pt")
    assert asked == [("FoundationVision/LlamaGen", "vq_ds16_c2i.pt")]
    with pytest.raises(FileNotFoundError, match=r"other.pt does not exist: download vq_ds8_c2i.pt"):
        llamagen.load_llamagen(tmp_path / "other.pt")
    assert len(asked) == 1  # only the two published names are looked for on the hub

    torch.save(as_llamagen(LlamaGen(TINY)), tmp_path / "cached.pt")
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, name: str(tmp_path / "cached.pt")
    )
    assert llamagen.load_llamagen("vq_ds8_c2i.pt", TINY).factor == 2


@pytest.mark.parametrize(
    ("config", "factor", "millions"), [(llamagen.DS8, 8, 70), (llamagen.DS16, 16, 72)]
)
def test_llamagen_sizes_are_the_published_ones(config, factor, millions):
    with torch.device("meta"):
        model = LlamaGen(config)
    assert model.factor == factor
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
