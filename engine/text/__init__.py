"""Between text and tokens: the tokenizer, the chat template, and the stream that turns tokens back into text."""
