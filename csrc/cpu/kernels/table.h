// The kernels every instruction set provides.
#pragma once

#include "isa/isa.h"
#include "step.h"

namespace ridgeline::RL_ISA {

void embed(const EmbedArgs&, const Step&, Worker&);
void norm(const NormArgs&, const Step&, Worker&);
void quantize(const QuantizeArgs&, const Step&, Worker&);
void linear(const LinearArgs&, const Step&, Worker&);
void rope_kv(const RopeKvArgs&, const Step&, Worker&);
void attention(const AttentionArgs&, const Step&, Worker&);
void select(const SelectArgs&, const Step&, Worker&);
void elementwise(const ElementwiseArgs&, const Step&, Worker&);
void concat(const ConcatArgs&, const Step&, Worker&);
void sample(const SampleArgs&);
double read_bytes(const uint8_t* data, size_t bytes, int variant);
double spin_ops(int kind, long iterations);

}  // namespace ridgeline::RL_ISA
