"""OpenAI-compatible completions."""
def routes(service): return []
