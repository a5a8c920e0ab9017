//! Pickles written opcode by opcode; those of real PyTorch are tested with the goldens.

use proptest::prelude::*;

use super::*;
use crate::checkpoint::support::{Dt, Named, Pickle, View};

fn read(pickle: &Pickle) -> Outcome<StateDict<'_>> {
    read_state_dict(&pickle.0)
}

fn view(name: &str) -> View {
    View { parameter: false, ..View::dense(&Named::zeros(name, Dt::Bf16, &[3, 5]), 7) }
}

#[test]
fn a_state_dict_lists_its_tensors_in_order() {
    let (mut first, second) = (view("b"), view("a"));
    (first.offset, first.strides, first.parameter) = (2, vec![1, 3], true);
    let bytes = Pickle::state_dict(&[first, second]);
    let found = read_state_dict(&bytes).unwrap();
    let expected = |offset, strides: [usize; 2]| PickledTensor {
        storage: "7",
        storage_len: 30,
        dtype: StoredType::from_safetensors("BF16").unwrap(),
        offset,
        shape: vec![3, 5],
        strides: strides.to_vec(),
    };
    assert_eq!(found.tensors, [("b", expected(2, [1, 3])), ("a", expected(0, [5, 1]))]);
    assert!(found.nested.is_empty());
}

#[test]
fn a_dtype_without_storage_class_is_told_by_the_tensor() {
    let fp8 = View { dtype: Dt::Fp8, ..view("w") };
    let bytes = Pickle::state_dict(&[fp8]);
    let found = read_state_dict(&bytes).unwrap();
    assert_eq!(found.tensors[0].1.dtype, StoredType::from_safetensors("F8_E4M3").unwrap());
    assert_eq!(found.tensors[0].1.storage_len, 15, "bytes, not elements");
}

#[test]
fn what_is_no_tensor_is_passed_over_and_the_last_of_a_name_counts() {
    let (mut one, mut two) = (view("w"), view("w"));
    (one.offset, two.offset) = (1, 0);
    let mut pickle = Pickle::default();
    pickle.op(b"\x80\x02}(").text("epoch").int(70_000).text("loss").op(b"G\0\0\0\0\0\0\0\0");
    pickle.text("w").tensor(&one).int(4).text("keys may be anything").text("none").op(b"N");
    pickle.text("list").op(b"]").int(1).op(b"a(").int(2).op(b"\x88\x89e").text("w").tensor(&two);
    pickle.text("optimizer").op(b"}u.");
    let found = read(&pickle).unwrap();
    assert_eq!(found.tensors.len(), 1);
    assert_eq!(found.tensors[0].1.offset, 0);
    assert_eq!(found.nested, ["optimizer"]);
}

#[test]
fn later_protocols_say_the_same() {
    // The same dictionary with frames, short strings, STACK_GLOBAL and MEMOIZE.
    let mut pickle = Pickle::default();
    let short = |pickle: &mut Pickle, text: &str| {
        pickle.op(&[0x8c, text.len() as u8]).op(text.as_bytes()).op(b"\x94");
    };
    pickle.op(b"\x80\x04\x95\0\0\0\0\0\0\0\0}\x94"); // memo 0
    short(&mut pickle, "w"); // 1
    short(&mut pickle, "torch._utils"); // 2
    short(&mut pickle, "_rebuild_tensor_v2"); // 3
    pickle.op(b"\x93\x94(("); // 4
    short(&mut pickle, "storage"); // 5
    short(&mut pickle, "torch"); // 6
    short(&mut pickle, "FloatStorage"); // 7
    pickle.op(b"\x93\x94").op(b"\x8d\x01\0\0\0\0\0\0\x000").op(b"h\x01").int(6).op(b"tQ"); // "0", location "w"
    pickle.int(0).ints(&[6]).ints(&[1]).op(b"\x89N").op(b"tRs.");
    let found = read(&pickle).unwrap();
    let (name, tensor) = &found.tensors[0];
    assert_eq!((*name, tensor.storage, &tensor.shape[..]), ("w", "0", &[6][..]));
}

#[test]
fn integers_of_every_width_are_read() {
    for (bytes, value) in [
        (&b"K\xff"[..], 255i64),
        (b"M\xff\xff", 65535),
        (b"J\xff\xff\xff\x7f", i64::from(i32::MAX)),
        (b"J\xff\xff\xff\xff", -1),
        (b"\x8a\x00", 0),
        (b"\x8a\x05\0\0\0\0\x01", 1 << 32),
        (b"\x8a\x01\x80", -128),
    ] {
        // As the offset of a tensor, where a negative one is refused with its value.
        let mut pickle = Pickle::default();
        pickle.op(b"}").text("w").global("torch._utils", "_rebuild_tensor_v2").op(b"((").text("storage");
        pickle.global("torch", "FloatStorage").text("0").text("cpu").int(1).op(b"tQ").op(bytes);
        pickle.ints(&[1]).ints(&[1]).op(b"\x89NtRs.");
        match read(&pickle) {
            Ok(found) => assert_eq!(found.tensors[0].1.offset as i64, value),
            Err(error) => {
                assert!(value < 0, "{error}");
                assert!(error.to_string().contains(&format!("offset {value}")), "{error}");
            }
        }
    }
}

#[test]
fn misuse_is_refused_with_its_place() {
    let cases: [(&[u8], &str); 16] = [
        (b"", "it ends"),
        (b".", "empty stack"),
        (b"K\x01.", "no dictionary"),
        (b"h\x05.", "memo 5 is empty"),
        (b"t.", "mark that was never set"),
        (b"}(K\x01u.", "key without a value"),
        (b"K\x01K\x02K\x03s.", "sets an item of an int"),
        (b"NNR.", "calls None with None"),
        (b"NQ.", "persistent id"),
        (b"NNb.", "sets the state of None"),
        (b"NNa.", "appends to None"),
        (b"}K\x01K\x02(ss.", "empty stack"),
        (b"\x80\x06.", "protocol 6"),
        (b"i", "opcode 0x69"),
        (b"X\x02\0\0\0\xff\xff.", "not UTF-8"),
        (b"ccollections\nOrderedDict\n)\x85R.", "1 arguments"),
    ];
    for (bytes, word) in cases {
        let error = read_state_dict(bytes).unwrap_err();
        assert!(matches!(error.problem, Problem::Malformed(_)), "{error}");
        assert!(error.to_string().contains(word), "`{word}` is not in: {error}");
    }
    let mut late = Pickle(b"\x80\x02NNN".to_vec());
    late.global("os", "system");
    assert_eq!(read(&late), Err(PickleError { at: 5, problem: Problem::Global("os.system".into()) }));
}

proptest! {
    /// Random programs of known opcodes end, one way or the other.
    #[test]
    fn random_programs_never_panic(
        program in prop::collection::vec(
            prop::sample::select(vec![
                &b"("[..], b")", b"}", b"]", b"N", b"K\x03", b"0", b"1", b"t", b"\x85", b"\x86", b"\x87", b"s", b"u",
                b"a", b"e", b"q\x00", b"h\x00", b"\x94", b"R", b"Q", b"b", b"\x93", b"X\x01\0\0\0w",
                b"X\x07\0\0\0storage", b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
                b"ctorch._utils\n_rebuild_tensor_v3\n", b"ctorch._utils\n_rebuild_parameter\n",
                b"ccollections\nOrderedDict\n", b"ctorch.storage\nUntypedStorage\n", b"ctorch\nint8\n", b".",
            ]),
            0..200,
        ),
    ) {
        let _ = read_state_dict(&program.concat());
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = read_state_dict(&bytes);
    }
}
