"""The text of a compiled program: loops, kernels, cycles and bytes, counted by hand."""

import functools

import pytest
import reference

from atebm_jax import hlo

# As compilers print it: one loop of four turns around another, whose turns vary.
TEXT = """HloModule jit_step, input_output_alias={ {0}: (0, {}, may-alias), {1}: (1, {}, must-alias) }

%inside (p.1: bf16[2,8,8,4], p.2: bf16[3,3,4,16]) -> bf16[2,8,8,16] {
  %p.1 = bf16[2,8,8,4]{3,2,1,0} parameter(0)
  %p.2 = bf16[3,3,4,16]{3,2,1,0} parameter(1)
  ROOT %convolution.1 = bf16[2,8,8,16]{3,2,1,0} convolution(%p.1, %p.2), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
}

%inner (c.1: (s32[], f32[4,6])) -> (s32[], f32[4,6]) {
  %c.1 = (s32[], f32[4,6]) parameter(0)
  %left = f32[4,6]{1,0} get-tuple-element(%c.1), index=1
  %right = f32[6,5]{1,0} constant({...})
  %dot.1 = f32[4,5]{1,0} dot(%left, %right), lhs_contracting_dims={1}, rhs_contracting_dims={0}, backend_config={"estimated_cycles":"7"}
}

%outer (c.2: (bf16[2,8,8,4], bf16[3,3,4,16])) -> (bf16[2,8,8,4], bf16[3,3,4,16]) {
  %c.2 = (bf16[2,8,8,4], bf16[3,3,4,16]) parameter(0)
  %x = bf16[2,8,8,4]{3,2,1,0} get-tuple-element(%c.2), index=0
  %w = bf16[3,3,4,16]{3,2,1,0} get-tuple-element(%c.2), index=1
  %fusion.1 = bf16[2,8,8,16]{3,2,1,0} fusion(%x, %w), kind=kOutput, calls=%inside, metadata={op_name="a convolution( b"}, backend_config={"estimated_cycles":"100"}
  %while.1 = (s32[], f32[4,6]) while(%t), condition=%never, body=%inner
}

ENTRY %main (a: f32[3]) -> f32[3] {
  %a = f32[3]{0} parameter(0)
  %all-reduce.1 = (f32[1000]{0}, bf16[6]{0}) all-reduce(%a, %b), to_apply=%sum, backend_config={"estimated_cycles":"30"}
  %while.2 = (bf16[2,8,8,4], bf16[3,3,4,16]) while(%t), condition=%never, body=%outer, metadata={op_name="jit(step)/climb"}, backend_config={"known_trip_count":{"n":"4"}}
}
"""  # noqa: E501


@pytest.fixture
def program():
    return reference.Program(TEXT)


def test_loops_have_their_scope_and_their_turns_where_known(program):
    (outer,) = program.loops()
    assert outer == hlo.Loop("jit(step)/climb", 4, "outer")
    assert program.loops("outer") == [hlo.Loop("", None, "inner")]


def test_cycles_count_nested_loops_and_skip_those_asked_for(program):
    # A loop of unknown length counts as one turn.
    cycles = functools.partial(program.total, program.own_cycles)
    assert cycles(name="outer") == 100 + 7
    assert cycles() == 30 + 4 * (100 + 7)
    assert cycles({"inner": 0}) == 30 + 4 * 100
    assert cycles({"outer": 0}) == 30


def test_turns_that_the_text_does_not_say_can_be_given(program):
    assert [loop.body for loop in program.all_loops()] == ["outer", "inner"]
    turns = {"outer": 2, "inner": 5}
    assert program.total(program.own_cycles, turns) == 30 + 2 * (100 + 5 * 7)
    assert program.total(program.own_cycles, {"outer": 0}) == 30


def test_kernels_cost_their_products_and_the_bytes_they_touch(program):
    assert ["fusion(" in line for line in program.kernels("outer")] == [True]
    image, kernel, result = 2 * 8 * 8 * 4, 3 * 3 * 4 * 16, 2 * 8 * 8 * 16
    flops = 2 * result * 3 * 3 * 4
    assert list(program.kernel_costs("outer")) == [
        (flops, 2 * (image + kernel + result))
    ]
    assert list(program.kernel_costs("inner")) == [
        (2 * 4 * 6 * 5, 4 * (4 * 6 + 6 * 5 + 4 * 5))
    ]


# cuDNN's custom calls name the operands of the forward pass: an image of 3 channels, a
# kernel 5x5 to 7, a result of half the size.
CUDNN = """HloModule jit_step

ENTRY %main (x: f32[2,8,8,3]) -> f32[7,5,5,3] {{
  %x = f32[2,8,8,3]{{3,2,1,0}} parameter(0)
  %w = f32[7,5,5,3]{{3,2,1,0}} parameter(1)
  %y = f32[2,4,4,7]{{3,2,1,0}} parameter(2)
  %made = ({result}, u8[1048576]{{0}}) custom-call({operands}), window={{size=5x5 stride=2x2}}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$conv{pass_}"
}}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("pass_", "operands", "result", "flops"),
    [
        # As often a product and a sum as the result has numbers, each of 5 * 5 * 3.
        ("Forward", "%x, %w", "f32[2,4,4,7]", 2 * (2 * 4 * 4 * 7) * (5 * 5 * 3)),
        # A number of the kernel's gradient sums over 2 * 4 * 4 places.
        ("BackwardFilter", "%x, %y", "f32[7,5,5,3]", 2 * (7 * 5 * 5 * 3) * (2 * 4 * 4)),
        # Each number of the result's gradient goes to 5 * 5 * 3 of the image's.
        ("BackwardInput", "%y, %w", "f32[2,8,8,3]", 2 * (2 * 4 * 4 * 7) * (5 * 5 * 3)),
    ],
)
def test_passes_of_a_convolution_cost_the_same_products(pass_, operands, result, flops):
    text = CUDNN.format(pass_=pass_, operands=operands, result=result)
    ((found, _),) = reference.Program(text).kernel_costs()
    assert found == flops == 33_600


def test_communications_have_elements_and_bytes(program):
    assert hlo.collectives(program.outside_loops()) == [
        ("all-reduce", 1000, 4 * 1000 + 2 * 6)
    ]
    assert program.num_aliases == 2


def test_names_of_python_functions_are_not_taken_for_code(program):
    _, outer = program.loop_bodies()
    assert reference.convolutions(outer) == [(2, 8, 8, 16)]
