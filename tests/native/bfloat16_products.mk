# Builds the test of bfloat16 products under AddressSanitizer and UBSan:
#   make -C tests/native -f bfloat16_products.mk
FOLDER   ?= ../../build/stress/bfloat16_products
# A null pointer is seen by its crash; its checks take a third of the time to compile.
CXXFLAGS := -std=c++20 -O0 -g1 -ffp-contract=off -Wall -Wno-psabi -fno-omit-frame-pointer \
            -fsanitize=address,undefined -fno-sanitize=null,object-size,vptr \
            -fno-sanitize-recover=all
UNITS    := isa packed_linear_avx512_bf16 packed_linear_amx_bf16
OBJECTS  := $(patsubst %,$(FOLDER)/%.o,bfloat16_products packed_linear_amx_emulated $(UNITS))
COMPILE   = @mkdir -p $(@D) && $(CXX) -MMD -MP $(CXXFLAGS) -c $< -o $@
vpath %.cpp ../../csrc/cpu .

$(FOLDER)/bfloat16_products: $(OBJECTS)
	$(CXX) $(CXXFLAGS) $^ -o $@

$(FOLDER)/%.o: %.cpp bfloat16_products.mk
	$(COMPILE)

# The unit of AMX once more, with a name of its own.
$(FOLDER)/packed_linear_amx_emulated.o: CXXFLAGS += -DVITSLIM_EMULATE_AMX \
  -Dpacked_linear_amx_bf16=packed_linear_amx_emulated
$(FOLDER)/packed_linear_amx_emulated.o: packed_linear_amx_bf16.cpp bfloat16_products.mk
	$(COMPILE)

-include $(OBJECTS:.o=.d)
