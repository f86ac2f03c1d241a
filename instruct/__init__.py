"""instruct/: make and curate the text that vision-language models are trained on."""
