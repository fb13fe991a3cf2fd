"""The conversions; each builds a plan and runs it. Import them as `llmconvert.converters`."""

if __name__ != "llmconvert.converters":
    raise ImportError("import `llmconvert.converters`, not `converters`: this folder is part of the llmconvert package")
