"""From a prompt to the numbers that a network is conditioned on. Knows no jobs and no devices but the encoder's own.

Reading order: `composition` (AND), `schedule` ([a:b:0.5]), `parsing` ((a:1.2)), then an engine with its tokenizer: `classic_engine` with
`clip_tokenizer`, `chunks`, `emphasis` for CLIP; `t5_engine` with `t5_tokenizer`; `chat_engine` and `picture_chat_engine` with `qwen_tokenizer` or
`gemma_tokenizer`, which reads `sentencepiece_file`. Textual inversion: `textual_inversion`, `embedding`, `embedding_files`, `embedding_creation`.

Example: "a (red:1.2) circle" becomes three spans of weights 1, 1.2 and 1, tokens in a chunk of 75 with a weight each, CLIP's features of the
chunk, and those of "red" scaled by 1.2 in the way that the setting Emphasis mode says.
"""
