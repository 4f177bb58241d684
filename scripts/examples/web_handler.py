"""Answer searches over a store by HTTP: STORE=features/resnet50 uvicorn web_handler:app."""

import os
from typing import Annotated

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Request

from extractor import DecodeError, Extractor, FeatureStore

NEIGHBORS = 5

app = FastAPI()
store = FeatureStore.open(os.environ["STORE"])
rows = store.features[:].astype(np.float32)
rows /= np.linalg.norm(rows, axis=1, keepdims=True)
embed = Extractor.for_store(store, batch_window_ms=5)


async def body(request: Request) -> bytes:
    return await request.body()


@app.post("/search")
def search(image: Annotated[bytes, Depends(body)]) -> list[dict[str, str | float]]:
    try:
        (vector,) = embed([image])
    except DecodeError as error:
        raise HTTPException(422, f"{error.reason}: {error}") from error
    cosines = rows @ (vector / np.linalg.norm(vector))
    best = np.argsort(-cosines)[:NEIGHBORS]
    return [{"path": store.paths[row], "cosine": float(cosines[row])} for row in best]
