"""A small valid module, the start of every wrong text."""

GOOD = """\
module @m {version = 1, target = cpu} {
  weight @w[l: 0..4]: bf16[16, 8] {
    %0 = weight.load {tensor = "layers.{l}.w", shape = [16, 8], dtype = bf16} : bf16[16, 8]
    return %0
  }
  func @layer(%l: index, %x: bf16[T, 8]) -> bf16[T, 8] {phase = prefill} {
    %0 = linear %x, @w[%l] : bf16[T, 16] loc(model.py:3)
    %1 = swiglu %0 : bf16[T, 8] loc(model.py:4, fuse)
    %2 = add %x, %1 : bf16[T, 8]
    return %2
  }
  func @main(%x: bf16[T, 8], %q: fp8_e4m3[T, 256] scale(ue8m0, 1x128), %k: fp8_e4m3[64, 256] scale(f32, 128x128)) {
    %0 = repeat %x {func = layer, first = 0, last = 3} : bf16[T, 8]
    %1, %2 = split %0 {sizes = [5, 3]} : bf16[T, 5], bf16[T, 3]
    return
  }
}
"""
