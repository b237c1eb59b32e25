"""The card of a merge, as a repository of the hub has it."""

import re

CARD = "README.md"
LOADS = re.compile(r'(\w+)\.from_pretrained\("(model|models/[A-Za-z0-9._-]+)"\)')
"""The lines of a card that load a model from the artifact's folder."""


def card_at(text: str, repository: str) -> str:
    """Return the card with lines that load the models from the repository."""

    def loads(found: re.Match[str]) -> str:
        where = "" if found[2] == "model" else f', subfolder="{found[2]}"'
        return f'{found[1]}.from_pretrained("{repository}"{where})'

    text = LOADS.sub(loads, text)
    return text.replace('SentenceTransformer("model")', f'SentenceTransformer("{repository}")').replace(
        "`model/` is the merged model", "This is the merged model"
    )
