"""Text to token ids and back: tokenizer, chat template, streaming detokenizer.

The compute plane ends at token ids. Import the modules themselves
(``from ridgeline.text.tokenizer import Tokenizer``): each brings in only what it needs.
"""
