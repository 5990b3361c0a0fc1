import hashlib

import pytest
import torch
import torch.nn.functional as F

from realsr_r1 import perceptual
from realsr_r1.first import degradation, pretrain, tokenizer, weights
from realsr_r1.first import reader as reader_module


def test_quantiser_by_hand():
    book = tokenizer.Codebook(2, 2, 0.25)
    book.weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    z = torch.tensor([3.0, 4.0]).view(
        1, 2, 1, 1
    )  # unit vector (0.6, 0.8): the second code, length ignored
    q, codes, loss = book(z)
    assert codes.item() == 1 and torch.allclose(q.flatten(), torch.tensor([0.0, 1.0]), atol=1e-6)
    assert float(loss) == pytest.approx(1.25 * (0.6**2 + 0.2**2) / 2 * 2, abs=1e-5)


def test_gradient_passes_straight_through():
    book = tokenizer.Codebook(8, 4, 0.25)
    z = F.normalize(torch.randn(1, 4, 2, 2), dim=1).requires_grad_()
    q, _, _ = book(z)
    direction = torch.randn_like(q)
    (q * direction).sum().backward()
    # up to the projection of the normalisation, the gradient of q arrives at z unchanged
    radial = (direction * z.detach()).sum(1, keepdim=True) * z.detach()
    assert torch.allclose(z.grad, direction - radial, atol=1e-5)


def test_dead_codes_move_onto_the_data_and_live_ones_stay():
    book = tokenizer.Codebook(4, 3, 0.25)
    book.usage = torch.tensor([1.0, 0.0, 2.0, 0.01])
    before, z = book.weight.detach().clone(), torch.randn(2, 3, 4, 4)
    assert book.revive(z, generator=torch.Generator().manual_seed(0)) == 2
    assert torch.equal(book.weight[[0, 2]], before[[0, 2]])
    pool = F.normalize(z, dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    assert all((pool - w).abs().sum(1).min() < 1e-5 for w in book.weight[[1, 3]])


@pytest.mark.parametrize("size", [(32, 32), (64, 40), (128, 128)])
def test_any_size_that_divides_by_the_factor(tiny, size):
    vq = tiny[0]
    x = torch.rand(2, 3, *size)
    codes = vq.encode(x)
    assert codes.shape == (2, size[0] // 8, size[1] // 8) and vq.decode(codes).shape == x.shape
    y, _q, again, loss = vq(x)
    assert y.shape == x.shape and torch.equal(codes, again) and loss.ndim == 0


def test_a_size_that_does_not_divide_is_refused(tiny):
    with pytest.raises(ValueError, match="30x32 pixels does not divide by 8"):
        tiny[0].encode(torch.rand(1, 3, 32, 30))


def test_every_parameter_learns(tiny):
    vq = tokenizer.VQModel(tiny[0].config)
    x = torch.rand(2, 3, 64, 64)
    y, _, _, loss = vq(x)
    ((x - y).abs().mean() + loss).backward()
    assert [n for n, p in vq.named_parameters() if p.grad is None] == []
    # the last layer of `smooth` starts at zero, so those before it have its first gradient a step
    # later
    still = {n for n, p in vq.named_parameters() if p.grad.abs().sum() == 0}
    assert still <= {f"smooth.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}


LLAMAGEN_TINY = tokenizer.TokenizerConfig(
    codes=32, fold=1, base=32, multiplier=(1, 2), res_blocks=1, latent=32
)


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
    ours = tokenizer.VQModel(LLAMAGEN_TINY).eval()
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
    loaded = tokenizer.load_llamagen({"model": theirs}, LLAMAGEN_TINY)
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(loaded.encode(x), ours.encode(x)) and torch.allclose(
        loaded.decode(ours.encode(x)), ours.decode(ours.encode(x)), atol=1e-5
    )


def test_llamagen_key_report_names_each_kind_in_one_message():
    theirs = as_llamagen(tokenizer.VQModel(LLAMAGEN_TINY))
    theirs.pop("encoder.mid.1.q.weight")
    theirs["encoder.mid.1.wrong"] = torch.zeros(1)
    theirs["quantize.embedding.weight"] = torch.zeros(16, 8)
    with pytest.raises(ValueError) as e:
        tokenizer.load_llamagen(theirs, LLAMAGEN_TINY)
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
        tokenizer.load_llamagen(theirs, LLAMAGEN_TINY)


def test_llamagen_file_checksum_and_damage(tmp_path, capsys):
    path = tmp_path / "vq_tiny.pt"
    theirs = as_llamagen(tokenizer.VQModel(LLAMAGEN_TINY))
    torch.save({"model": theirs, "steps": 3}, path)
    tokenizer.load_llamagen(path, LLAMAGEN_TINY)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"vq_tiny.pt: SHA-256 {digest}" in capsys.readouterr().out
    tokenizer.load_llamagen(str(path), LLAMAGEN_TINY, sha256=digest.upper())
    assert capsys.readouterr().out == ""  # nothing to say: it was checked
    with pytest.raises(ValueError, match=f"has the SHA-256 {digest}, expected was {'0' * 64}"):
        tokenizer.load_llamagen(path, LLAMAGEN_TINY, sha256="0" * 64)
    whole = path.read_bytes()
    for broken in (whole[:2000], b"not a checkpoint", b""):
        path.write_bytes(broken)
        with pytest.raises(
            ValueError, match="is not a torch checkpoint of tensors, or is cut short"
        ):
            tokenizer.load_llamagen(path, LLAMAGEN_TINY)


def test_llamagen_number_of_levels_is_read_from_the_names(monkeypatch):
    for name, levels in (("LLAMAGEN_DS8", 4), ("LLAMAGEN_DS16", 5)):
        config = tokenizer.TokenizerConfig(
            codes=16, fold=1, base=32, multiplier=(1,) * levels, res_blocks=1, latent=32
        )
        monkeypatch.setattr(tokenizer, name, config)
        assert tokenizer.load_llamagen(as_llamagen(tokenizer.VQModel(config))).factor == 2 ** (
            levels - 1
        )


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
        tokenizer.load_llamagen("vq_ds16_c2i.pt")
    assert asked == [("FoundationVision/LlamaGen", "vq_ds16_c2i.pt")]
    with pytest.raises(FileNotFoundError, match=r"other.pt does not exist: download vq_ds8_c2i.pt"):
        tokenizer.load_llamagen(tmp_path / "other.pt")
    assert len(asked) == 1  # only the two published names are looked for on the hub

    torch.save(as_llamagen(tokenizer.VQModel(LLAMAGEN_TINY)), tmp_path / "cached.pt")
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, name: str(tmp_path / "cached.pt")
    )
    assert tokenizer.load_llamagen("vq_ds8_c2i.pt", LLAMAGEN_TINY).factor == 2


@pytest.mark.parametrize(
    ("config", "millions"), [(tokenizer.LLAMAGEN_DS8, 70), (tokenizer.LLAMAGEN_DS16, 72)]
)
def test_llamagen_sizes_are_the_published_ones(config, millions):
    with torch.device("meta"):
        model = tokenizer.VQModel(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


@pytest.mark.parametrize(
    ("config", "factor"),
    [(tokenizer.LLAMAGEN_DS8, 8), (tokenizer.LLAMAGEN_DS16, 16), (tokenizer.NANO, 8)],
)
def test_pixels_a_code(config, factor):
    assert config.factor == factor


def test_save_and_load(tiny, tmp_path):
    for model in (*tiny[:2], tokenizer.GuidedDecoder(width=16, blocks=1)):
        weights.save(model, tmp_path / "m.safetensors")
        back = weights.load(tmp_path / "m.safetensors")
        assert all(
            torch.allclose(a, b, atol=2e-3)
            for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True)
        )


def test_bad_weights_get_one_sentence(tiny, tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(FileNotFoundError, match="are missing"):
        weights.load(path)
    weights.save(tiny[1], path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    with pytest.raises(ValueError, match="cut short or damaged"):
        weights.load(path)
    path.write_bytes(whole.replace(b'summary_codes\\": 8', b'summary_codes\\": 9'))
    with pytest.raises(ValueError, match="do not fit"):
        weights.load(path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="were not written by"):
        weights.load(path)


def test_reader_keeps_the_pixels_apart_from_the_summary(tiny):
    reader = tiny[1]
    x = torch.rand(2, 3, 32, 32)
    codes = reader.encode(x)
    assert codes.shape == (2, 17, 16)
    assert codes[:, :16].max() < 24 <= codes[:, 16].min() and codes.max() < reader.vocabulary == 32
    y, loss = reader.pixels(x)
    logits, _ = reader.summary(reader_module.signal_features(x), reader_module.content_features(x))
    assert y.shape == x.shape and logits["noise"].shape == (2, 4) and loss.ndim == 0
    # one photo's summary does not depend on its neighbour in the batch
    assert torch.equal(reader.encode(x[1:])[0], codes[1])
    with pytest.raises(ValueError, match="32x32 pixels"):
        reader.encode(torch.rand(1, 3, 64, 64))


def test_block_dct_is_orthonormal_and_sees_jpeg():
    x = torch.rand(2, 3, 16, 24)
    c = reader_module.block_dct(x)
    assert c.shape == (2, 3, 6, 8, 8)
    assert torch.allclose((c**2).sum((2, 3, 4)), (x**2).sum((2, 3)), rtol=1e-4)
    assert torch.allclose(c[0, 0, 0, 0, 0], x[0, 0, :8, :8].mean() * 8, rtol=1e-4)
    photo = torch.rand(1, 3, 32, 32)
    z = {
        q: reader_module.block_dct(reader_module.luma_chroma(degradation.jpeg(photo[0], q)[None]))[
            :, 0
        ].abs()
        for q in (95, 10)
    }
    zero = {q: float((c < 0.6).float().mean()) for q, c in z.items()}
    assert zero[10] > zero[95] + 0.2  # coarse quantisation sets most coefficients to zero
    assert reader_module.signal_features(photo).shape == (1, reader_module.SIGNAL_FEATURES)
    assert reader_module.content_features(photo).shape == (1, reader_module.CONTENT_FEATURES)


def test_guided_decoder_starts_between_its_two_inputs():
    guided = tokenizer.GuidedDecoder(width=16, blocks=1)
    lr, plain = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 32, 32)
    up = F.interpolate(lr, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)
    assert torch.allclose(guided(lr, plain, torch.randn(2, 8, 4, 4)), (plain + up) / 2, atol=1e-6)
    assert torch.allclose(
        tokenizer.GuidedDecoder(width=16, blocks=1, use_codes=False)(lr), up, atol=1e-6
    )


def test_lpips_is_zero_for_equal_and_orders_damage():
    x = F.interpolate(torch.rand(2, 3, 8, 8), size=64, mode="bicubic").clamp(0, 1)
    assert perceptual.distance(x, x).abs().max() < 1e-6
    a, b = (
        perceptual.distance(x, (x + s * torch.randn_like(x)).clamp(0, 1)).mean()
        for s in (0.02, 0.2)
    )
    assert 0 < a < b


def test_shipped_tokenizer_on_held_out_scenes(shipped, pairs):
    scores, used = pretrain.measure_tokenizer(shipped.tokenizer, shipped.guided, pairs)
    lpips = {k: sum(v["LPIPS-alex"]) / len(pairs) for k, v in scores.items()}
    assert lpips["plain decode, scenes"] < 0.6 * lpips["bicubic of the LR"]
    assert lpips["guided decode, true codes"] < 0.6 * lpips["bicubic of the LR"]
    assert (
        lpips["guided decode, true codes"]
        < lpips["guided decode, 30% wrong codes"]
        < lpips["guided decode, all codes wrong"]
    )
    assert sum(scores["guided decode, true codes"]["PSNR"]) > sum(
        scores["bicubic of the LR"]["PSNR"]
    )
    assert used > 0.5


def test_a_killed_run_resumes_where_its_checkpoint_was(tmp_path):
    class Killed(Exception):
        pass

    def run(out, die_at=None):
        torch.manual_seed(0)
        model, seen = tokenizer.GuidedDecoder(width=8, blocks=1, use_codes=False), []

        def loss_of(step):
            if step == die_at:
                raise Killed
            seen.append(step)
            x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(step))
            y = model(x)
            return (y - 0.5).abs().mean(), {}

        pretrain.fit(model, loss_of, 12, out, checkpoint_seconds=0, log_every=3)
        return model, seen

    whole, _ = run(tmp_path / "a.safetensors")
    with pytest.raises(Killed):
        run(tmp_path / "b.safetensors", die_at=7)
    assert (tmp_path / "b.ckpt").exists() and not (tmp_path / "b.safetensors").exists()
    resumed, seen = run(tmp_path / "b.safetensors")
    assert seen == [7, 8, 9, 10, 11] and not (tmp_path / "b.ckpt").exists()
    assert all(
        torch.allclose(a, b, atol=1e-6)
        for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)
    )
    assert (tmp_path / "b.csv").read_text().splitlines()[-1].startswith("12,")


def test_absent_device_is_named():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch finds none here"):
            pretrain.device_of("cuda")
    with pytest.raises(ValueError, match="choose cpu, cuda or mps"):
        pretrain.device_of("tpu")


@pytest.mark.parametrize("what", ["tokenizer", "reader", "guided", "regression"])
def test_each_training_runs_and_writes_weights(what, pairs, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain.scenes, "crop", lambda i: torch.rand(3, 128, 128))
    out = tmp_path / "w.safetensors"
    if what == "tokenizer":
        pretrain.train_tokenizer(pairs, out, steps=2, config=tiny[0].config, device="cpu")
    elif what == "reader":
        pretrain.train_reader(pairs, out, steps=2, batch=4, device="cpu")
    else:
        pretrain.train_guided(
            pairs, tiny[0], out, steps=2, batch=2, use_codes=what == "guided", device="cpu"
        )
    assert weights.load(out) is not None
    logs = (
        ("w_pixels.csv", "w_summary.csv") if what == "reader" else ("w.csv",)
    )  # the reader is trained in two fits
    assert {p.name for p in tmp_path.glob("*.csv")} == set(logs)
