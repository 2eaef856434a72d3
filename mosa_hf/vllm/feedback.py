"""
The way between the scheduler's `ArenaManager` and the worker's `Arena`: a KV connector of vLLM that transfers no keys.
Down go the blocks of requests, up goes what they have taken of them.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.logger import init_logger

from .arena import ARENA, Arena
from .spec import ArenaManager, Report, Update

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.outputs import KVConnectorOutput

logger = init_logger("vllm.mosa_hf")  # below vLLM's own, whose handlers print it
DROPPED = "mosa_dropped_entries"


@dataclass
class ArenaUpdates(KVConnectorMetadata):
    updates: list[Update] = field(default_factory=list)


@dataclass
class ArenaReports(KVConnectorWorkerMetadata):
    reports: dict[int, Report] = field(default_factory=dict)  # by row
    num_dropped: int = 0

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "ArenaReports":
        assert isinstance(other, ArenaReports)
        reports = dict(self.reports)
        for row, report in other.reports.items():
            reports[row] = reports[row].aggregate(report) if row in reports else report
        return ArenaReports(reports, self.num_dropped + other.num_dropped)


class ArenaStats(KVConnectorStats):
    """How many selected tokens have been dropped for want of blocks."""

    def reset(self) -> None:
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> "ArenaStats":
        return ArenaStats(data={DROPPED: self.data.get(DROPPED, 0) + other.data.get(DROPPED, 0)})

    def reduce(self) -> dict[str, int | float]:
        return dict(self.data)

    def is_empty(self) -> bool:
        return not self.data.get(DROPPED)


class ArenaPromMetrics(KVConnectorPromMetrics):
    """The same as a counter of the server's `/metrics`."""

    def __init__(self, vllm_config, metric_types, labelnames, per_engine_labelvalues):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter = metric_types[Counter](
            name=f"vllm:{DROPPED}", documentation="Selected tokens that found no cache block.", labelnames=labelnames
        )
        self.counters = {engine: counter.labels(*values) for engine, values in per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        self.counters[engine_idx].inc(transfer_stats_data.get(DROPPED, 0))


class ArenaConnector(KVConnectorBase_V1, SupportsHMA):
    """Made by vLLM, once in the scheduler and once in each worker."""

    manager: ArenaManager | None = None  # in the scheduler
    num_dropped = 0  # there, in all
    num_told = 0  # of them, to vLLM
    has_warned = False

    # In the scheduler

    def bind_kv_cache_manager(self, kv_cache_manager: "KVCacheManager") -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        (manager,) = kv_cache_manager.coordinator.single_type_managers
        assert isinstance(manager, ArenaManager)
        self.manager = manager

    def build_connector_meta(self, scheduler_output) -> ArenaUpdates:
        if scheduler_output.preempted_req_ids:
            self._manager.is_full = True
        return ArenaUpdates(self._manager.take_updates())

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        reports = connector_output.kv_connector_worker_meta
        if not isinstance(reports, ArenaReports):
            return
        self._manager.observe(reports.reports)
        self.num_dropped += reports.num_dropped
        if reports.num_dropped and not self.has_warned:
            self.has_warned = True
            logger.warning(
                "Requests have come to more selected tokens than there are cache blocks for, and those that score "
                "lowest are dropped (`vllm:%s` counts them). Give the cache more memory, or lower `max_model_len`; "
                'with `mosa_reserve` "rate", a higher `mosa_slack` does, too.',
                DROPPED,
            )

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        if self.num_dropped == self.num_told:
            return None
        stats, self.num_told = ArenaStats(data={DROPPED: self.num_dropped - self.num_told}), self.num_dropped
        return stats

    @property
    def _manager(self) -> ArenaManager:
        assert self.manager is not None
        return self.manager

    def get_num_new_matched_tokens(self, request, num_computed_tokens) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request, blocks, num_external_tokens) -> None:
        pass

    def request_finished_all_groups(self, request, block_ids) -> tuple[bool, None]:
        self._manager.is_full = False
        return False, None

    # In a worker

    @property
    def arena(self) -> Arena:
        return self._vllm_config.compilation_config.static_forward_context[ARENA]

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        # Before anything of a step, its attention metadata included, is prepared.
        assert isinstance(kv_connector_metadata, ArenaUpdates)
        self.arena.apply(kv_connector_metadata.updates)

    def build_connector_worker_meta(self) -> ArenaReports:
        return ArenaReports(self.arena.reports(), self.arena.take_dropped())

    def start_load_kv(self, forward_context, **kwargs) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        return ArenaStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, vllm_config, metric_types, labelnames, per_engine_labelvalues):
        return ArenaPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
