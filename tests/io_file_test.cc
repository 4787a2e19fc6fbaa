// byte_source.cc: what is a file and what is not; reading behind the end; a file that shrinks; and
// every read of the readers failing in turn.
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "io_raw_files.h"

using namespace fathom;
using namespace fathom::io;
using namespace fathom::test;

namespace {

std::shared_ptr<ByteSource> opened(const std::string& path) {
  Result<std::shared_ptr<ByteSource>> source = open_file(path);
  INFO(source.status().message());
  REQUIRE(source.ok());
  return std::move(source).value();
}

// Fails the n-th read, counted from 0, and tells how many there were.
class FailingSource final : public ByteSource {
 public:
  enum class How { kIoError, kShort };
  FailingSource(std::shared_ptr<ByteSource> inner, int fail_at, How how)
      : inner_(std::move(inner)), fail_at_(fail_at), how_(how) {}
  int64_t size() const noexcept override { return inner_->size(); }
  const std::string& name() const noexcept override { return inner_->name(); }
  Status read(int64_t offset, std::span<std::byte> out) const noexcept override {
    if (n_reads_++ != fail_at_) return inner_->read(offset, out);
    if (how_ == How::kIoError) return Status(Code::kIo, "injected").with_errno(EIO);
    return Status(Code::kFormat, "injected: the file ends early").at(static_cast<uint64_t>(offset));
  }
  int n_reads() const { return n_reads_; }

 private:
  std::shared_ptr<ByteSource> inner_;
  int fail_at_;
  How how_;
  mutable int n_reads_ = 0;
};

}  // namespace

TEST_CASE("files and memory are read alike") {
  const TemporaryFolder folder;
  const std::string bytes = "0123456789";
  folder.write("ten", bytes);
  const std::shared_ptr<ByteSource> sources[] = {opened(folder / "ten"), source_of(bytes, "ten")};
  for (const auto& source : sources) {
    CHECK(source->size() == 10);
    CHECK(source->name().ends_with("ten"));
    std::string out(4, '?');
    const auto span = std::as_writable_bytes(std::span(out));
    CHECK(source->read(3, span).ok());
    CHECK(out == "3456");
    CHECK(source->read(6, span).ok());
    CHECK(out == "6789");
    CHECK(source->read(10, span.first(0)).ok());
    for (const int64_t offset : {int64_t{7}, int64_t{10}, int64_t{-1}, INT64_MAX, INT64_MIN}) {
      const Status status = source->read(offset, span);
      check_refused(status, Code::kFormat);
      CHECK(status.message().find("ten") != std::string_view::npos);
      CHECK(out == "6789");
    }
  }
}

TEST_CASE("a name that is no regular file") {
  const TemporaryFolder folder;
  SECTION("missing") {
    const Status status = open_file(folder / "none").status();
    check_refused(status, Code::kNotFound);
    CHECK(status.sys_errno() == ENOENT);
  }
  SECTION("below a file") {
    folder.write("file", "x");
    check_refused(open_file(folder / "file/more").status(), Code::kNotFound);
  }
  SECTION("a zero byte in the name") {
    check_refused(open_file(std::string("a\0b", 3)).status(), Code::kInvalidArgument);
    check_refused(TensorFile::open(std::string("a\0b", 3)).status(), Code::kInvalidArgument);
    check_refused(TensorFile::open("").status(), Code::kInvalidArgument);
  }
  SECTION("a directory") {
    check_refused(open_file(folder.path()).status(), Code::kFormat);
    std::filesystem::create_directory(folder / "model.gguf");
    check_refused(TensorFile::open(folder / "model.gguf").status(), Code::kNotFound);
  }
  SECTION("a pipe that nobody writes to") {  // must not wait
    REQUIRE(mkfifo((folder / "pipe.gguf").c_str(), 0600) == 0);
    const Status status = TensorFile::open(folder / "pipe.gguf").status();
    check_refused(status, Code::kFormat);
    CHECK(status.message().find("a pipe") != std::string_view::npos);
    std::filesystem::create_symlink(folder / "pipe.gguf", folder / "link.gguf");
    check_refused(TensorFile::open(folder / "link.gguf").status(), Code::kFormat);
  }
  SECTION("devices") {
    for (const char* device : {"/dev/zero", "/dev/null"}) {
      const Status status = TensorFile::open(device).status();
      check_refused(status, Code::kFormat);
      CHECK(status.message().find("a device") != std::string_view::npos);
    }
  }
  SECTION("a loop of symbolic links") {
    std::filesystem::create_symlink(folder / "b.gguf", folder / "a.gguf");
    std::filesystem::create_symlink(folder / "a.gguf", folder / "b.gguf");
    const Status status = TensorFile::open(folder / "a.gguf").status();
    check_refused(status, Code::kIo);
    CHECK(status.sys_errno() == ELOOP);
    std::filesystem::create_symlink(folder / "gone", folder / "dangling");
    check_refused(open_file(folder / "dangling").status(), Code::kNotFound);
  }
  SECTION("a link to a file is that file") {
    folder.write("file", "abc");
    std::filesystem::create_symlink("file", folder / "link");
    CHECK(opened(folder / "link")->size() == 3);
  }
  SECTION("no permission") {
    folder.write("secret", "x");
    REQUIRE(chmod((folder / "secret").c_str(), 0) == 0);
    if (geteuid() == 0) {
      WARN("runs as root, who may read everything: not tested");
    } else {
      const Status status = open_file(folder / "secret").status();
      check_refused(status, Code::kIo);
      CHECK(status.sys_errno() == EACCES);
    }
  }
  SECTION("no descriptors left") {
    folder.write("file", "x");
    rlimit limit{}, none{};
    REQUIRE(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    none = limit;
    none.rlim_cur = 0;
    REQUIRE(setrlimit(RLIMIT_NOFILE, &none) == 0);
    const Status status = open_file(folder / "file").status();
    REQUIRE(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    check_refused(status, Code::kIo);
    CHECK(status.sys_errno() == EMFILE);
  }
}

TEST_CASE("empty and tiny files of every ending") {
  const TemporaryFolder folder;
  for (const std::string ending : {".gguf", ".safetensors", ".bin", ""})
    for (const std::string bytes : {"", "G", "GGU", "GGUF", "GGUF\3\0", "abcdefg"}) {
      INFO(ending << " with " << bytes.size() << " bytes");
      folder.write("tiny" + ending, bytes);
      check_refused(TensorFile::open(folder / ("tiny" + ending)).status(), Code::kFormat);
    }
}

TEST_CASE("a GGUF file is known by its first bytes, whatever its name") {
  const TemporaryFolder folder;
  folder.write("model.bin", small_gguf().bytes());
  CHECK(TensorFile::open(folder / "model.bin").ok());
}

TEST_CASE("a sparse file of a terabyte is refused or read without reading it all") {
  const TemporaryFolder folder;
  const std::string path = folder / "huge.gguf";
  constexpr off_t kTerabyte = off_t{1} << 40;
  const CpuTimer timer;
  const auto stretch = [&](std::string_view name, const std::string& bytes) {
    folder.write(name, bytes);
    if (truncate((folder / name).c_str(), kTerabyte) == 0) return true;
    WARN("this file system has no files of 1 TB (" << std::strerror(errno) << "): not tested");
    return false;
  };
  SECTION("zeros") {
    if (!stretch("huge.gguf", "")) return;
    check_refused(TensorFile::open(path).status(), Code::kFormat);
  }
  SECTION("an array as long as the file") {
    RawGguf raw = small_gguf();
    raw.set("z.bytes", ::raw<uint32_t>(9) + ::raw<uint32_t>(0) + ::raw<uint64_t>(1ull << 39));
    raw.tensors.clear();
    if (!stretch("huge.gguf", raw.bytes())) return;
    check_refused(TensorFile::open(path).status(), Code::kFormat);
  }
  SECTION("a vocabulary of empty pieces") {
    RawGguf raw = small_gguf();
    raw.set("tokenizer.ggml.tokens",
            ::raw<uint32_t>(9) + ::raw<uint32_t>(8) + ::raw<uint64_t>(1ull << 36));
    raw.tensors.clear();
    if (!stretch("huge.gguf", raw.bytes())) return;
    check_refused(TensorFile::open(path).status(), Code::kFormat);
  }
  SECTION("a good header before the hole") {
    if (!stretch("huge.gguf", small_gguf().bytes())) return;
    const Result<TensorFile> file = TensorFile::open(path);
    REQUIRE(file.ok());
    CHECK(file->total_bytes() == kTerabyte);
  }
  SECTION("safetensors") {
    if (!stretch("huge.safetensors", raw<uint64_t>(1ull << 39))) return;
    check_refused(TensorFile::open(folder / "huge.safetensors").status(), Code::kFormat);
    // The longest header that is read: zeros.
    if (!stretch("huge.safetensors", raw<uint64_t>(100'000'000))) return;
    check_refused(TensorFile::open(folder / "huge.safetensors").status(), Code::kFormat);
  }
  CHECK(timer.seconds() < 2);
}

TEST_CASE("a file that shrinks after it was opened is an error, not a signal") {
  const TemporaryFolder folder;
  folder.write("model.gguf", small_gguf().bytes());
  const Result<TensorFile> file = TensorFile::open(folder / "model.gguf");
  REQUIRE(file.ok());
  const TensorInfo* output = file->find("output.weight");
  std::vector<std::byte> bytes(static_cast<size_t>(output->bytes));
  CHECK(file->read(*output, 0, bytes).ok());
  REQUIRE(truncate((folder / "model.gguf").c_str(), output->offset + 10) == 0);
  const Status status = file->read(*output, 0, bytes);
  check_refused(status, Code::kFormat);
  CHECK(status.offset() == static_cast<uint64_t>(output->offset + 10));
  CHECK(status.key() == "output.weight");
  CHECK(status.message().find("model.gguf") != std::string_view::npos);
}

TEST_CASE("whichever read fails, its code comes back") {
  RawGguf with_many = small_gguf();  // several buffers long
  std::vector<std::string> merges;
  for (int i = 0; i < 40'000; ++i) merges.push_back("left" + std::to_string(i) + " right");
  with_many.set_strings("tokenizer.ggml.merges", merges);
  const std::shared_ptr<ByteSource> gguf = source_of(with_many.bytes());
  const std::shared_ptr<ByteSource> safetensors = source_of(small_safetensors().bytes());
  using Parse = Result<TensorFile> (*)(std::shared_ptr<ByteSource>);
  const std::pair<Parse, std::shared_ptr<ByteSource>> parsers[] = {
      {&TensorFile::parse_gguf, gguf}, {&TensorFile::parse_safetensors, safetensors}};
  for (const auto& [parse, inner] : parsers) {
    const auto good = std::make_shared<FailingSource>(inner, -1, FailingSource::How::kShort);
    REQUIRE(parse(good).ok());
    const int n_reads = good->n_reads();
    CHECK(n_reads >= 2);
    for (int n = 0; n < n_reads; ++n) {
      INFO("read " << n << " of " << n_reads);
      const Status io =
          parse(std::make_shared<FailingSource>(inner, n, FailingSource::How::kIoError)).status();
      check_refused(io, Code::kIo);
      CHECK(io.sys_errno() == EIO);
      const Status cut =
          parse(std::make_shared<FailingSource>(inner, n, FailingSource::How::kShort)).status();
      check_refused(cut, Code::kFormat);
    }
  }
}

TEST_CASE("no descriptor stays open after a refusal") {
  const auto open_descriptors = [] {
    int n = 0;
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
      (void)entry;
      ++n;
    }
    return n;
  };
  const TemporaryFolder folder;
  RawGguf raw = small_gguf();
  raw.set_u16("split.no", 0);
  raw.set_u16("split.count", 2);
  folder.write("x-00001-of-00002.gguf", raw.bytes());
  folder.write("x-00002-of-00002.gguf", "GGUF");
  folder.write("bad.safetensors", "0123456789");
  const int before = open_descriptors();
  for (int i = 0; i < 20; ++i) {
    CHECK_FALSE(TensorFile::open(folder / "x-00001-of-00002.gguf").ok());
    CHECK_FALSE(TensorFile::open(folder / "bad.safetensors").ok());
    CHECK_FALSE(TensorFile::open(folder.path()).ok());
  }
  CHECK(open_descriptors() == before);
}
