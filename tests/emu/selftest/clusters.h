// clusters.h: launches of clusters of blocks, a part of driver.cpp: included there, among its functions.
#pragma once

void clusters() {
    char path[] = "/tmp/emulated-log-XXXXXX";
    CHECK(mkstemp(path) >= 0);
    setenv("EMU_LOG", path, 1);
    setenv("EMU_CC", "9.0", 1);
    start();
    int able = 0;
    OK("cuDeviceGetAttribute", &able, 120, 0);
    CHECK(able == 1);
    Pointer out = allocate(6 * 4);
    void *parameters[] = {&out};
    void *s = stream();
    const auto launch = [&](unsigned blocks, std::vector<CUlaunchAttribute> all) {
        return launch_ex("cluster_ranks", parameters, blocks, 0, s, std::move(all));
    };
    const auto ranks = [&] {
        std::vector<int> got(6);
        OK("cuStreamSynchronize", s);
        OK("cuMemcpyDtoH_v2", static_cast<void *>(got.data()), out, got.size() * 4);
        return got;
    };
    const std::vector<int> none(6, 0), twos{0, 1, 0, 1, 0, 1};
    CHECK(launch(6, {}) == SUCCESS && ranks() == none);
    CHECK(launch(6, {cluster(2)}) == SUCCESS && ranks() == twos);
    CHECK(launch(6, {cluster(1)}) == SUCCESS && ranks() == none);
    CHECK(launch(5, {cluster(2)}) == INVALID_VALUE && launch(6, {cluster(4)}) == INVALID_VALUE);
    CHECK(launch(6, {cluster(3)}) == NOT_SUPPORTED);
    void *graph = nullptr, *exec = nullptr;
    OK("cuStreamBeginCapture_v2", s, 1);
    CHECK(launch(6, {cluster(2)}) == SUCCESS);
    OK("cuStreamEndCapture", s, &graph);
    OK("cuGraphInstantiateWithFlags", &exec, graph, 0ull);
    OK("cuGraphDestroy", graph);
    OK("cuGraphLaunch", exec, s);
    CHECK(ranks() == twos);
    std::stringstream text;
    text << std::ifstream(path).rdbuf();
    std::remove(path);
    CHECK(holds(text.str(), "\"cluster\":[2,1,1]") && !holds(text.str(), "\"cluster\":[1,1,1]"));
}
