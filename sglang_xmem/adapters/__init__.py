"""One module an SGLang version: everything that names SGLang's internals."""
