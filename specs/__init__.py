"""One file per architecture, as data. Import them as `llmconvert.specs`."""

if __name__ != "llmconvert.specs":
    raise ImportError("import `llmconvert.specs`, not `specs`: this folder is part of the llmconvert package")
