"""How byte-level BPE vocabularies cut text into words before merging.

A GGUF file names the way in ``tokenizer.ggml.pre``; the names are llama.cpp's (``llama-vocab.cpp``), the
expressions those of the models' own ``tokenizer.json``. Expressions apply one after another: each cuts
the pieces left by the one before into its matches and what lies between them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ridgeline.core.errors import UnsupportedError

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (  # a word with at most one change from upper to lower case
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|"
)
_SLASHED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
_DIGITS_GPT2 = (r"\p{N}", *_GPT2)
_LLAMA3 = (rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}",)
_QWEN2 = (rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}",)
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_TEKKEN = (_CASED % ("", "") + r"\p{N}|" + _SLASHED_TAIL,)
_GPT4O = (_CASED % (f"{_CONTRACTION}?", f"{_CONTRACTION}?") + r"\p{N}{1,3}|" + _SLASHED_TAIL,)
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", *_GPT2, r"[0-9][0-9][0-9]")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", *_GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")


@dataclass(frozen=True)
class PreTokenizer:
    """Cutting expressions and what goes with them.

    Attributes:
        patterns: Oniguruma expressions, applied in order.
        ignore_merges: a word that is itself a token becomes it, whatever the merges say.
        add_bos: whether text starts with the begin token when the file does not say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_BY_NAME: dict[str, PreTokenizer] = {
    name: way
    for way, names in (
        (PreTokenizer(_DEFAULT), "default"),
        (PreTokenizer(_GPT2), "gpt-2 phi-2 mpt olmo jais mellum modern-bert gigachat a.x-4.0 exaone4 trillion"),
        (PreTokenizer(_DIGITS_GPT2), "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"),
        (PreTokenizer(_LLAMA3, True, True), "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2"),
        (PreTokenizer(_LLAMA3), "dbrx smaug-bpe chatglm-bpe"),
        (PreTokenizer(_LLAMA3, True), "glm4"),
        (PreTokenizer(_QWEN2), "qwen2 deepseek-r1-qwen kormo megrez stablelm2 hunyuan grok-2 solar-open"),
        (PreTokenizer(_QWEN35), "qwen35"),
        (PreTokenizer(_TEKKEN, True, True), "tekken"),
        (PreTokenizer(_GPT4O), "gpt-4o llama4 kanana2"),
        (PreTokenizer(_FALCON), "falcon"),
        (PreTokenizer(_DEEPSEEK3), "deepseek-v3 joyai-llm hunyuan-dense"),
        (PreTokenizer(_DEEPSEEK_CODER), "deepseek-coder"),
    )
    for name in names.split()
}


def pre_tokenizer(name: str) -> PreTokenizer:
    """The way a file calls ``name``; raises UnsupportedError naming an unknown one."""
    try:
        return _BY_NAME[name]
    except KeyError:
        known = ", ".join(sorted(_BY_NAME))
        raise UnsupportedError(
            f"tokenizer.ggml.pre {name!r} is not a supported pre-tokenizer (known: {known})"
        ) from None
