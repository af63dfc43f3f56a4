"""Flags and outputs of data.intentions."""

KEY = "sk-secret-0123456789"


def endpoint_flags(server, *more):
    return "--endpoint", server.url, "--model", "chatty", *more


def output_files(paths):
    return sorted(path.name for path in paths[-1].parent.iterdir())
