"""Tasks of conf/eval as lmms-eval reads them: their questions as JSON lines, and the file that describes them."""
