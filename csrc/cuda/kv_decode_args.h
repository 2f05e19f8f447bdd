// What the decode attention kernels are given (kv_decode.h). Plain C++: the torch bindings fill it.
#pragma once

#include <cstdint>

namespace resq::cuda {

struct KvDecodeArgs {
  const uint16_t* query;  // rotated, bf16 or float16; heads begin at multiples of 16 bytes
  const uint8_t* cache;
  uint16_t* output;
  float* partial;   // [S, Hkv, rows, splits, head_dim], where a sequence takes more than one split
  float* log_sums;  // [S, Hkv, rows, splits], base 2
  const int32_t* block_table;
  const int32_t* seq_lens;
  const int32_t* query_start;  // [S + 1]
  int64_t query_token, query_head, output_token, output_head, cache_block, cache_head, table_row;  // strides, elements
  float scale;  // of the softmax, times log2 e
  int32_t half;  // query and output are float16
  int32_t window;  // tokens that a query sees, itself included; 0 or less: all
  int32_t splits, rows, group, kv_heads;
};

}  // namespace resq::cuda
