"""Answer searches over a store by HTTP: STORE=features/resnet50 uvicorn web_handler:app."""

import os
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request

from extractor import DecodeError, Extractor, FeatureStore

app = FastAPI()
store = FeatureStore.open(os.environ["STORE"])
embed = Extractor.for_store(store, batch_window_ms=5)


async def body(request: Request) -> bytes:
    return await request.body()


@app.post("/search")
def search(image: Annotated[bytes, Depends(body)]) -> list[dict[str, str | float]]:
    try:
        (found,) = store.search(embed([image]), k=5)
    except DecodeError as error:
        raise HTTPException(422, f"{error.reason}: {error}") from error
    return [{"path": hit.path, "cosine": hit.score} for hit in found]
