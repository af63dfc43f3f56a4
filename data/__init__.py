"""Raw ratings, or the answers of a chat model -> dataset folder."""
