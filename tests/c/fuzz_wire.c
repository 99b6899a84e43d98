/* Fuzz target of the frame header: no input may crash it, and what it accepts
 * must be what encoding gives.
 *
 * With libFuzzer: clang -fsanitize=fuzzer -DLIBFUZZER. Without, main() below
 * mutates the corpus by itself: fuzz_wire SECONDS FILE... */
#include "check.h"

#include <stdint.h>
#include <string.h>
#include <time.h>

#include "exchange/exchange.h"

enum { MAX_PAYLOAD = 2048 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  /* A copy of the exact size, for AddressSanitizer to guard its end. */
  uint8_t *frame = calloc(bytes ? bytes : 1, 1);
  if (bytes > 0)
    memcpy(frame, data, bytes);
  zmoe_header header;
  memset(&header, 0xff, sizeof header);
  if (zmoe_wire_decode(frame, bytes, MAX_PAYLOAD, &header) == ZMOE_WIRE_OK) {
    uint8_t again[ZMOE_HEADER_BYTES];
    zmoe_wire_encode(&header, again);
    CHECK(memcmp(again, frame, sizeof again) == 0);
    CHECK(bytes == ZMOE_HEADER_BYTES + (size_t)header.payload_bytes);
    CHECK(header.payload_bytes <= MAX_PAYLOAD && header.source < ZMOE_MAX_NODES);
    uint64_t whole = zmoe_payload_bytes((zmoe_dtype)header.dtype, header.rows, header.width);
    CHECK(header.payload_bytes == 0 || header.kind == ZMOE_KIND_ROWS ||
          (header.chunks == 0 ? header.payload_bytes == whole : header.payload_bytes <= whole));
    CHECK(header.payload_bytes == 0 || header.kind != ZMOE_KIND_ROWS ||
          (header.payload_bytes >= whole && (header.payload_bytes - whole) % ZMOE_PAIR_BYTES == 0));
    CHECK(header.chunks == 0 || header.chunk < header.chunks);
  }
  free(frame);
  return 0;
}

enum { MAX_INPUT = ZMOE_HEADER_BYTES + 2 * MAX_PAYLOAD, MAX_SEEDS = 256 };

static uint64_t state = 88172645463325252u;

static uint64_t next_random(void) {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state;
}

/* Half of the inputs are given a right checksum again: otherwise none would
 * come past it. */
static void repair(uint8_t *data, size_t bytes) {
  if (bytes < ZMOE_HEADER_BYTES || next_random() % 2)
    return;
  uint32_t checksum = zmoe_crc32c(data, ZMOE_HEADER_BYTES - 4, ZMOE_ISA_GENERIC);
  for (int i = 0; i < 4; i++)
    data[ZMOE_HEADER_BYTES - 4 + i] = (uint8_t)(checksum >> (8 * i));
}

#ifdef LIBFUZZER

size_t LLVMFuzzerMutate(uint8_t *data, size_t bytes, size_t most);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t bytes, size_t most, unsigned seed);

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t bytes, size_t most, unsigned seed) {
  state = seed + UINT64_C(88172645463325252);
  bytes = LLVMFuzzerMutate(data, bytes, most);
  repair(data, bytes);
  return bytes;
}

#else

static struct {
  uint8_t data[MAX_INPUT];
  size_t bytes;
} seeds[MAX_SEEDS];

static size_t mutate(uint8_t *data, size_t bytes) {
  for (uint64_t n = 1 + next_random() % 4; n > 0; n--) {
    uint64_t kind = next_random() % 6;
    if (kind == 0 && bytes < MAX_INPUT)
      data[bytes++] = (uint8_t)next_random();
    else if (kind == 1)
      bytes -= next_random() % (bytes + 1) % 16;
    else if (kind == 2)
      bytes = next_random() % (MAX_INPUT + 1);
    else if (kind == 3 && bytes > 0)
      data[next_random() % bytes] = (uint8_t)next_random();
    else if (kind == 4 && bytes > 0)
      data[next_random() % bytes % ZMOE_HEADER_BYTES] ^= (uint8_t)(1u << next_random() % 8);
    else if (kind == 5 && bytes > 40)
      memset(data + next_random() % 40, next_random() % 2 ? 0xff : 0, 1 + next_random() % 8);
  }
  return bytes;
}

int main(int argc, char **argv) {
  CHECK(argc >= 3);
  int n_seeds = 0;
  for (int i = 2; i < argc && n_seeds < MAX_SEEDS; i++, n_seeds++) {
    FILE *file = fopen(argv[i], "rb");
    CHECK(file != NULL);
    seeds[n_seeds].bytes = fread(seeds[n_seeds].data, 1, MAX_INPUT, file);
    fclose(file);
    LLVMFuzzerTestOneInput(seeds[n_seeds].data, seeds[n_seeds].bytes);
  }
  long long runs = 0, accepted = 0;
  static uint8_t data[MAX_INPUT];
  zmoe_header header;
  for (time_t end = time(NULL) + atoi(argv[1]); time(NULL) < end;) {
    for (int i = 0; i < 1000; i++, runs++) {
      uint64_t seed = next_random() % (uint64_t)n_seeds;
      memcpy(data, seeds[seed].data, MAX_INPUT);
      size_t bytes = mutate(data, seeds[seed].bytes);
      repair(data, bytes);
      accepted += zmoe_wire_decode(data, bytes, MAX_PAYLOAD, &header) == ZMOE_WIRE_OK;
      LLVMFuzzerTestOneInput(data, bytes);
    }
  }
  printf("fuzz_wire: %lld runs from %d seeds, %lld accepted\n", runs, n_seeds, accepted);
  CHECK(accepted > 0 && accepted < runs);
  return 0;
}
#endif
