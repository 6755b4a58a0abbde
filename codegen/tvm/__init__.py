"""CPU kernels and programs through TVM; importing it loads TVM and fills the table of emitters."""

from moec.codegen.tvm import emit_attention, emit_heads, emit_moe, emit_rows

__all__ = ["emit_attention", "emit_heads", "emit_moe", "emit_rows"]
