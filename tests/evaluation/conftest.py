import pytest


@pytest.fixture
def api_key(monkeypatch):
    """What an endpoint of OpenAI's kind is given; the servers of these tests ask for none in particular."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
