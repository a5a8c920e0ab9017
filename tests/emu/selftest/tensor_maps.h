// tensor_maps.h: Hopper's maps of tensors, a part of driver.cpp: included there, among its functions.
#pragma once

// Hopper's maps: what is refused, one thing wrong at a time; older devices refuse all.
void tensor_maps() {
    setenv("EMU_CC", "9.0", 1);
    start();
    alignas(64) unsigned char map[128];
    struct Ask {
        int type = 6;
        unsigned rank = 2;
        Size shift = 0;
        std::uint64_t sizes[5] = {100, 50, 3, 2, 2}, strides[4] = {208, 10400, 31200, 62400};
        unsigned box[5] = {64, 128, 1, 1, 1}, steps[5] = {1, 1, 1, 1, 1};
        int interleave = 0, swizzle = 3, promotion = 2, fill = 0;
    };
    const Pointer tensor = allocate(1 << 17);
    const auto ask = [&](const Ask &a) {
        return call("cuTensorMapEncodeTiled", static_cast<void *>(map), a.type, a.rank,
                    reinterpret_cast<void *>(tensor + a.shift), a.sizes, a.strides, a.box, a.steps, a.interleave,
                    a.swizzle, a.promotion, a.fill);
    };
    const auto refused = [&](auto change) {
        Ask a;
        change(a);
        return ask(a) == INVALID_VALUE;
    };
    CHECK(ask({}) == SUCCESS);
    for (unsigned rank = 1; rank <= 5; rank++) {
        Ask a;
        a.rank = rank;
        CHECK(ask(a) == SUCCESS);
    }
    CHECK(!refused([](Ask &a) { a.swizzle = 0, a.box[0] = 256, a.box[1] = 256; }));
    CHECK(refused([](Ask &a) { a.rank = 0; }) && refused([](Ask &a) { a.rank = 6; }));
    CHECK(refused([](Ask &a) { a.shift = 8; }) && refused([](Ask &a) { a.strides[0] = 200; }));
    CHECK(refused([](Ask &a) { a.rank = 3, a.strides[1] = 10408; }));       // no multiple of 16
    CHECK(refused([](Ask &a) { a.rank = 3, a.strides[1] = 10416; }));       // of the stride before
    CHECK(refused([](Ask &a) { a.rank = 3, a.sizes[2] = 0; }) && refused([](Ask &a) { a.rank = 3, a.box[2] = 257; }));
    CHECK(refused([](Ask &a) { a.rank = 3, a.steps[2] = 2; }) && !refused([](Ask &a) { a.strides[1] = 10408; }));
    CHECK(refused([](Ask &a) { a.sizes[1] = 0; }) && refused([](Ask &a) { a.sizes[0] = (1ull << 32) + 1; }));
    CHECK(refused([](Ask &a) { a.box[1] = 257; }) && refused([](Ask &a) { a.box[1] = 0; }));
    CHECK(refused([](Ask &a) { a.box[0] = 72; }) && refused([](Ask &a) { a.box[0] = 60; }));
    CHECK(refused([](Ask &a) { a.steps[1] = 2; }) && refused([](Ask &a) { a.type = 7; }));
    CHECK(refused([](Ask &a) { a.fill = 1; }) && refused([](Ask &a) { a.swizzle = 7; }));

    // Through a launch: 1 x 1, in A and B, is 64 after 64 columns and is not more after what lies beyond them.
    const std::vector<unsigned short> ones(128 * 72, 0x3c00);
    const Pointer d = allocate(128 * 64 * 2);
    alignas(64) unsigned char map_b[128];
    OK("cuMemcpyHtoD_v2", tensor, static_cast<const void *>(ones.data()), ones.size() * 2);
    Ask a;
    a.sizes[0] = 64, a.sizes[1] = 128, a.strides[0] = 144;
    CHECK(ask(a) == SUCCESS);
    a.box[1] = 64;
    std::swap(map, map_b);
    CHECK(ask(a) == SUCCESS);
    int n = 64, k = 72;
    Pointer to = d;
    void *parameters[] = {&to, map_b, map, &n, &k};
    void *function = kernel("hopper_gemm");
    const unsigned shared = 3 * 24576 + 1024 + 48;
    OK("cuFuncSetAttribute", function, 8, static_cast<int>(shared));
    OK("cuLaunchKernel", function, 1u, 1u, 1u, 384u, 1u, 1u, shared, static_cast<void *>(nullptr), &parameters[0],
       static_cast<void **>(nullptr));
    std::vector<unsigned short> got(128 * 64);
    OK("cuMemcpyDtoH_v2", static_cast<void *>(got.data()), d, got.size() * 2);
    for (const unsigned short x : got) {
        CHECK(x == 0x5400); // 64
    }
}

void no_tensor_maps() {
    start();
    alignas(64) unsigned char map[128];
    const std::uint64_t sizes[1] = {64};
    const unsigned box[1] = {64}, steps[1] = {1};
    CHECK(call("cuTensorMapEncodeTiled", static_cast<void *>(map), 6, 1u, reinterpret_cast<void *>(allocate(128)), sizes,
               static_cast<const std::uint64_t *>(nullptr), box, steps, 0, 3, 0, 0) == NOT_SUPPORTED);
}
