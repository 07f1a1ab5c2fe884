#define AFA_ISA avx512bf16
#define AFA_ISA_LEVEL 3
#include "cpu/isa/table.h"
