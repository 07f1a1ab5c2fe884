#define AFA_ISA avx512
#define AFA_ISA_LEVEL 2
#include "cpu/isa/table.h"
