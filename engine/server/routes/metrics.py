"""GET /metrics: Prometheus' text format."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

router = APIRouter()


@router.get("/metrics", response_class=Response)
async def get_metrics(request: Request) -> Response:
    """All series; engine/server/grafana.json draws them."""
    return Response(generate_latest(request.app.state.metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)
