"""A middle size: a pretrained small language model (Qwen3-0.6B class) that learns the chain.

Between the nano policy, which starts from nothing, and the paper's 7 B: a `ChainPolicy` whose body
knows English. It keeps our vocabulary alone (the captions need some 200 of Qwen's 151,936 tokens):
words start as the mean of their pieces' rows, codes from the codebook. Eye and positions start
fresh. What comes out is a policy like any other: `realsr train policy --init` and `realsr train
grpo --model` take it.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, Qwen3ForCausalLM

from realsr_r1.planning import cost
from realsr_r1.policy import ChainPolicy, PolicyConfig
from realsr_r1.tokenizer import VQModel
from realsr_r1.vlcot import Vocabulary

SOURCE = "Qwen/Qwen3-0.6B"


def pretrained(source: str | Path = SOURCE) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerBase]:
    """A Qwen3 and its tokenizer from a folder in the hub's format, or by its name from the hub (or
    its local cache).

    Raises FileNotFoundError if there is no such folder and no network, ValueError for another class
    of model or damaged files, RuntimeError if it does not fit into free memory; one sentence each.
    """
    name = str(source)
    try:
        shape = AutoConfig.from_pretrained(source)
    except (OSError, HFValidationError) as e:
        raise FileNotFoundError(
            f"no model {name}: give a folder with config.json, model.safetensors and "
            f"tokenizer.json, or --download where there is a network"
        ) from e
    except (ValueError, StrictDataclassError) as e:
        raise ValueError(
            f"{name}'s config.json is damaged or of a class that this transformers does not "
            f"know: use a Qwen3 such as {SOURCE}"
        ) from e
    if shape.model_type != "qwen3":
        raise ValueError(
            f"{name} is a {shape.model_type} model: the middle size takes a Qwen3 such as {SOURCE}"
        )
    need = 4 * cost.Shape.of(shape).parameters
    cost.require(need, torch.device("cpu"), f"loading {Path(name).name}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, info = Qwen3ForCausalLM.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        raise ValueError(
            f"the files of {name} are incomplete, damaged or do not fit together: download them "
            f"again"
        ) from e
    missing = [
        k for k in info["missing_keys"] if not (shape.tie_word_embeddings and k == "lm_head.weight")
    ]
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} weights, the first is {missing[0]}: download it again"
        )
    return model, tokenizer


def spoken(token: str) -> str:
    """What a token of ours means in English, from whose pieces its row starts: "</rough_image>" → "
    end of rough image"."""
    name = token.strip("</>").replace("_", " ")
    return f" end of {name}" if token.startswith("</") else f" {name}"


@torch.no_grad()
def start_rows(
    table: Tensor,
    old: Tensor,
    vocabulary: Vocabulary,
    tokenizer: PreTrainedTokenizerBase,
    codebook: Tensor,
    seed: int,
) -> None:
    """Fill our embedding `table` (v, h) in place, on the scale of the pretrained rows `old` (n, h).

    Words: the mean of their pieces. Codes: the mean row, plus the codebook's unit vectors (codes,
    d) in a random direction each, as far out as pretrained rows lie: codes that look alike start
    alike."""
    g = torch.Generator().manual_seed(seed)
    center, spread = old.mean(0), old.std(0)
    for i, token in enumerate(vocabulary.tokens[: vocabulary.first_code]):
        pieces = tokenizer.encode(spoken(token), add_special_tokens=False)
        noise = 0.1 * spread * torch.randn(len(spread), generator=g)
        one = len(pieces) == 1  # the same word: its row as it is
        table[i] = (old[pieces].mean(0) if pieces else center) + (0.0 if one else noise)
    unit = F.normalize(codebook.detach().float().cpu(), dim=1)
    rows = center + unit @ (torch.randn(unit.shape[1], len(spread), generator=g) * spread)
    rows += 0.1 * spread * torch.randn(len(unit), len(spread), generator=g)
    table[vocabulary.first_code :] = rows


def start(source: str | Path, tokenizer: VQModel, seed: int = 0) -> ChainPolicy:
    """A policy of a pretrained Qwen3's shape and weights, for the codes of `tokenizer`."""
    model, words = pretrained(source)
    c = model.config
    torch.manual_seed(seed)
    policy = ChainPolicy(
        PolicyConfig(
            codes=tokenizer.config.codes,
            hidden_size=c.hidden_size,
            layers=c.num_hidden_layers,
            heads=c.num_attention_heads,
            kv_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            mlp=c.intermediate_size,
            rope_theta=c.rope_parameters["rope_theta"],
        )
    )
    body = {k: v for k, v in model.model.state_dict().items() if k != "embed_tokens.weight"}
    policy.model.load_state_dict(body, strict=False)
    table, old = policy.get_input_embeddings().weight, model.get_input_embeddings().weight
    book = tokenizer.codebook.weight
    start_rows(table, old.detach().float(), policy.vocabulary, words, book, seed)
    return policy.eval()
