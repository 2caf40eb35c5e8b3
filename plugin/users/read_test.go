/*
   Copyright The guest-pull Authors.

   Licensed under the Apache License, Version 2.0 (the "License");
   you may not use this file except in compliance with the License.
   You may obtain a copy of the License at

       http://www.apache.org/licenses/LICENSE-2.0

   Unless required by applicable law or agreed to in writing, software
   distributed under the License is distributed on an "AS IS" BASIS,
   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
   See the License for the specific language governing permissions and
   limitations under the License.
*/

package users

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// entry is a tar entry: a directory when name ends in a slash, a link when it
// has a target, else a regular file.
type entry struct {
	name, data   string
	symlink      string
	hardlink     string
	typ          byte
	opaqueRecord bool
}

func file(name, data string) entry     { return entry{name: name, data: data} }
func dir(name string) entry            { return entry{name: name + "/"} }
func symlinkTo(name, to string) entry  { return entry{name: name, symlink: to} }
func hardlinkTo(name, to string) entry { return entry{name: name, hardlink: to} }

func (e entry) header() *tar.Header {
	h := &tar.Header{Name: e.name, Mode: 0o755, Typeflag: tar.TypeReg, Size: int64(len(e.data))}
	switch {
	case e.typ != 0:
		h.Typeflag = e.typ
	case e.symlink != "":
		h.Typeflag, h.Linkname = tar.TypeSymlink, e.symlink
	case e.hardlink != "":
		h.Typeflag, h.Linkname = tar.TypeLink, e.hardlink
	case strings.HasSuffix(e.name, "/"):
		h.Typeflag = tar.TypeDir
	}
	if e.opaqueRecord {
		h.PAXRecords = map[string]string{"SCHILY.xattr.trusted.overlay.opaque": "y"}
	}
	return h
}

func makeTar(t testing.TB, entries ...entry) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		require.NoError(t, w.WriteHeader(e.header()))
		_, err := io.WriteString(w, e.data)
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	return b.Bytes()
}

// registry serves layers and remembers which were asked for.
type registry struct {
	layers  []Layer // lowest first
	blobs   map[digest.Digest][]byte
	fetched []int
}

// add adds a layer on top.
func (r *registry) add(t testing.TB, encoding string, content []byte) {
	var b bytes.Buffer
	mediaType := ocispec.MediaTypeImageLayer
	switch encoding {
	case "gzip":
		w := gzip.NewWriter(&b)
		_, err := w.Write(content)
		require.NoError(t, errors.Join(err, w.Close()))
		mediaType = ocispec.MediaTypeImageLayerGzip
	case "zstd":
		w, err := zstd.NewWriter(&b)
		require.NoError(t, err)
		_, err = w.Write(content)
		require.NoError(t, errors.Join(err, w.Close()))
		mediaType = ocispec.MediaTypeImageLayerZstd
	case "encrypted":
		mediaType = ocispec.MediaTypeImageLayerGzip + "+encrypted"
		fallthrough
	default:
		b.Write(content)
	}
	if r.blobs == nil {
		r.blobs = map[digest.Digest][]byte{}
	}
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b.Bytes()), Size: int64(b.Len())}
	r.blobs[desc.Digest] = b.Bytes()
	r.layers = append(r.layers, Layer{Descriptor: desc, DiffID: digest.FromBytes(content)})
}

func (r *registry) fetch(_ context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	for i, l := range r.layers {
		if l.Descriptor.Digest == desc.Digest {
			r.fetched = append(r.fetched, i)
			return io.NopCloser(iotest.HalfReader(bytes.NewReader(r.blobs[desc.Digest]))), nil
		}
	}
	return nil, fmt.Errorf("layer %s: %w", desc.Digest, errdefs.ErrNotFound)
}

const none = "<no such file>"

func text(b []byte) string {
	if b == nil {
		return none
	}
	return string(b)
}

func TestRead(t *testing.T) {
	base := []entry{dir("etc"), file("etc/passwd", "P"), file("etc/group", "G")}
	for _, tc := range []struct {
		name          string
		layers        [][]entry // lowest first
		passwd, group string
		fetched       []int // the layers that are read, in order
	}{
		{"one layer", [][]entry{base}, "P", "G", []int{0}},
		{"no layer", nil, none, none, nil},
		{"neither", [][]entry{{dir("bin"), file("bin/sh", "x")}}, none, none, []int{0}},
		{"empty file", [][]entry{{file("etc/passwd", "")}}, "", none, []int{0}},
		{"names that begin with ./ and /", [][]entry{{dir("./etc"), file("./etc/passwd", "P"), file("/etc/group", "G")}}, "P", "G", []int{0}},
		{"from two layers", [][]entry{base, {file("etc/passwd", "P2")}}, "P2", "G", []int{1, 0}},
		{"nothing below is read", [][]entry{{file("etc/passwd", "old")}, base, {file("usr/bin/x", "")}}, "P", "G", []int{2, 1}},
		{"added later", [][]entry{{dir("etc"), file("etc/group", "G")}, {file("etc/passwd", "P")}}, "P", "G", []int{1, 0}},
		{"twice in a layer", [][]entry{{file("etc/passwd", "1"), file("etc/passwd", "2")}}, "2", none, []int{0}},
		{"replaced by a directory and back", [][]entry{{file("etc/passwd", "1"), dir("etc/passwd"), file("etc/passwd", "3")}}, "3", none, []int{0}},

		{"whiteout", [][]entry{base, {file("etc/.wh.passwd", "")}}, none, "G", []int{1, 0}},
		{"whiteout of the directory", [][]entry{base, {file(".wh.etc", "")}}, none, none, []int{1}},
		{"whiteout as a device", [][]entry{base, {entry{name: "etc/passwd", typ: tar.TypeChar}}}, none, "G", []int{1, 0}},
		{"whiteout and again", [][]entry{base, {file("etc/.wh.passwd", ""), file("etc/passwd", "P2")}}, "P2", "G", []int{1, 0}},
		{"whiteout, and again above", [][]entry{base, {file("etc/.wh.passwd", "")}, {file("etc/passwd", "P2")}}, "P2", "G", []int{2, 1, 0}},
		{"whiteout of the directory, made again above", [][]entry{base, {file(".wh.etc", "")}, {dir("etc"), file("etc/group", "G2")}}, none, "G2", []int{2, 1}},
		{"whiteout in a directory that is no other", [][]entry{base, {file("usr/.wh.etc", ""), file("etcetera/.wh.passwd", "")}}, "P", "G", []int{1, 0}},
		{"opaque directory", [][]entry{base, {dir("etc"), file("etc/.wh..wh..opq", ""), file("etc/group", "G2")}}, none, "G2", []int{1}},
		{"opaque directory, marker last", [][]entry{base, {file("etc/group", "G2"), file("etc/.wh..wh..opq", "")}}, none, "G2", []int{1}},
		{"opaque root", [][]entry{base, {file(".wh..wh..opq", ""), file("etc/group", "G2")}}, none, "G2", []int{1}},
		{"opaque by attribute", [][]entry{base, {entry{name: "etc/", opaqueRecord: true}}}, none, none, []int{1}},
		{"directory replaced by a file", [][]entry{base, {file("etc", "x")}}, none, none, []int{1}},
		{"directory replaced by a file and made again above", [][]entry{base, {file("etc", "x")}, {dir("etc")}}, none, none, []int{2, 1}},

		{"symbolic link, relative", [][]entry{{symlinkTo("etc/passwd", "../usr/lib/passwd"), file("usr/lib/passwd", "P")}}, "P", none, []int{0}},
		{"symbolic link, absolute", [][]entry{{symlinkTo("etc/passwd", "/usr/lib/passwd"), file("usr/lib/passwd", "P")}}, "P", none, []int{0}},
		{"symbolic link to what came before", [][]entry{{file("a/passwd", "P"), symlinkTo("etc/passwd", "/a/passwd")}}, "P", none, []int{0, 0}},
		{"symbolic link to a layer above", [][]entry{{symlinkTo("etc/passwd", "/a/passwd"), file("a/passwd", "old")}, {file("a/passwd", "P")}}, "P", none, []int{1, 0, 1}},
		{"symbolic link to a layer below", [][]entry{{file("a/passwd", "P")}, {symlinkTo("etc/passwd", "/a/passwd")}}, "P", none, []int{1, 1, 0}},
		{"symbolic link out of the root", [][]entry{{symlinkTo("etc/passwd", "../../../a"), file("a", "P")}}, "P", none, []int{0}},
		{"dangling symbolic link", [][]entry{{symlinkTo("etc/passwd", "/nowhere"), file("etc/group", "G")}}, none, "G", []int{0, 0}},
		{"chain of symbolic links", [][]entry{{symlinkTo("etc/passwd", "a"), symlinkTo("etc/a", "b"), symlinkTo("etc/b", "/c"), file("c", "P")}}, "P", none, []int{0}},
		{"/etc is a symbolic link", [][]entry{{symlinkTo("etc", "private/etc"), file("private/etc/passwd", "P"), file("private/etc/group", "G")}}, "P", "G", []int{0}},
		{"/etc is a symbolic link, written through", [][]entry{{symlinkTo("etc", "private/etc"), file("etc/passwd", "P")}}, "P", none, []int{0, 0}},
		{"/etc is a symbolic link, below", [][]entry{{symlinkTo("etc", "/private"), file("private/passwd", "P"), file("private/group", "G")}, {file("private/group", "G2")}}, "P", "G2", []int{1, 0, 1}},
		// containerd unpacks the upper layer without a look at the lower one.
		{"/etc is a symbolic link, hidden by a directory above", [][]entry{{symlinkTo("etc", "/private"), file("private/passwd", "P")}, {file("etc/group", "G")}}, none, "G", []int{1, 0}},
		{"written through an unrelated link", [][]entry{{symlinkTo("x", "/etc"), file("x/passwd", "P")}}, "P", none, []int{0}},
		{"an unrelated link replaced by a directory", [][]entry{{symlinkTo("x", "/etc"), dir("x"), file("x/passwd", "P")}}, none, none, []int{0}},
		{"a link below a replaced directory", [][]entry{{symlinkTo("y/x", "/etc"), file("y", ""), file("y", "")}}, none, none, []int{0}},
		{"symbolic link with .. behind another", [][]entry{{symlinkTo("etc/passwd", "/l/../p"), symlinkTo("l", "a/b"), file("a/b/x", ""), file("a/p", "P"), file("p", "wrong")}}, "P", none, []int{0, 0, 0}},

		{"hard link", [][]entry{{file("a", "P"), hardlinkTo("etc/passwd", "a")}}, "P", none, []int{0, 0}},
		{"hard link to a wanted file", [][]entry{{file("etc/passwd", "P"), hardlinkTo("etc/group", "/etc/passwd")}}, "P", "P", []int{0}},
		{"hard link to a file that is replaced later", [][]entry{{file("a", "P"), hardlinkTo("etc/passwd", "a"), file("a", "new")}}, "P", none, []int{0, 0}},
		{"hard link to a symbolic link", [][]entry{{symlinkTo("l", "/etc/real"), hardlinkTo("etc/passwd", "l"), file("etc/real", "P")}}, "P", none, []int{0}},
	} {
		for _, encoding := range []string{"", "gzip", "zstd"} {
			t.Run(tc.name+" "+encoding, func(t *testing.T) {
				var r registry
				for _, l := range tc.layers {
					r.add(t, encoding, makeTar(t, l...))
				}
				files, stats, err := Read(t.Context(), r.layers, r.fetch)
				require.NoError(t, err)
				assert.Equal(t, tc.passwd, text(files.Passwd), "/etc/passwd")
				assert.Equal(t, tc.group, text(files.Group), "/etc/group")
				assert.Equal(t, tc.fetched, r.fetched, "layers read")
				seen, size := map[int]bool{}, int64(0)
				for _, i := range r.fetched {
					seen[i] = true
					size += r.layers[i].Descriptor.Size
				}
				assert.Equal(t, Stats{Layers: len(seen), Bytes: size}, stats)
			})
		}
	}
}

// What cannot be had from the image is an error of a kind that tells it from
// one that another attempt may not give.
func TestReadUnusable(t *testing.T) {
	loop := []entry{symlinkTo("etc/passwd", "passwd2"), symlinkTo("etc/passwd2", "passwd")}
	var grows []entry
	for i := range 2000 {
		grows = append(grows, symlinkTo("etc/passwd", fmt.Sprintf("/x%d", i)))
	}
	var kept []entry
	for i := range 7 {
		kept = append(kept, symlinkTo("etc/passwd", fmt.Sprintf("/x%d", i)), file(fmt.Sprintf("x%d", i), strings.Repeat("x", MaxFileSize)))
	}
	for _, tc := range []struct {
		name     string
		encoding string
		content  []byte
		why      string
	}{
		{"directory", "", makeTar(t, dir("etc/passwd")), "not a regular file"},
		{"fifo", "", makeTar(t, entry{name: "etc/passwd", typ: tar.TypeFifo}), "not a regular file"},
		{"link to the root", "", makeTar(t, symlinkTo("etc/passwd", "/")), "not a regular file"},
		{"too large", "gzip", makeTar(t, file("etc/group", ""), file("etc/passwd", strings.Repeat("x", MaxFileSize+1))), "larger than 10485760 bytes"},
		{"loop", "", makeTar(t, loop...), "too many symbolic links"},
		{"loop of directories", "", makeTar(t, symlinkTo("etc", "etc/etc")), "too many symbolic links"},
		{"entry behind a loop", "", makeTar(t, symlinkTo("a", "b"), symlinkTo("b", "a"), file("a/x", "")), "too many symbolic links"},
		{"too many paths", "", makeTar(t, grows...), "too many links"},
		{"too much to keep", "gzip", makeTar(t, kept...), "too many files"},
		{"encrypted", "encrypted", makeTar(t, file("etc/passwd", "P")), "encrypted"},
		{"no tar", "", bytes.Repeat([]byte("x"), 2048), "cannot be read"},
		{"cut off", "gzip", makeTar(t, file("a", strings.Repeat("x", 4096)))[:1024], "cannot be read"},
		{"hard link to nothing", "", makeTar(t, hardlinkTo("etc/passwd", "nothing")), "not there"},
		{"entry below a file", "", makeTar(t, file("etc", ""), file("etc/passwd", "")), "no directory"},
		{"whiteout of nothing", "", makeTar(t, file("etc/.wh.", "")), "whiteout of nothing"},
		{"unknown type", "", makeTar(t, entry{name: "x", typ: tar.TypeCont}), "unknown type"},
		{"broken gzip", "", []byte{0x1f, 0x8b, 1, 2, 3}, "cannot be read"},
		{"broken zstd", "", []byte{0x28, 0xb5, 0x2f, 0xfd, 0xff, 0xff, 0xff}, "cannot be read"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var r registry
			r.add(t, tc.encoding, tc.content)
			files, _, err := Read(t.Context(), r.layers, r.fetch)
			require.Truef(t, errdefs.IsFailedPrecondition(err), "%v", err)
			require.Falsef(t, errdefs.IsDataLoss(err), "%v", err)
			require.ErrorContains(t, err, tc.why)
			require.Equal(t, Files{}, files)
		})
	}
}

func TestLargestFile(t *testing.T) {
	var r registry
	r.add(t, "gzip", makeTar(t, file("etc/passwd", strings.Repeat("p", MaxFileSize)), file("etc/group", strings.Repeat("g", MaxFileSize))))
	files, _, err := Read(t.Context(), r.layers, r.fetch)
	require.NoError(t, err)
	require.Len(t, files.Passwd, MaxFileSize)
	require.Len(t, files.Group, MaxFileSize)
}

// An encrypted layer is an obstacle only if something in it counts.
func TestEncryptedBelow(t *testing.T) {
	var r registry
	r.add(t, "encrypted", []byte("secret"))
	r.add(t, "gzip", makeTar(t, file("etc/passwd", "P")))
	_, _, err := Read(t.Context(), r.layers, r.fetch)
	require.ErrorContains(t, err, "/etc/group")
	require.ErrorContains(t, err, "encrypted")
	require.NotContains(t, r.fetched, 0)

	r.add(t, "gzip", makeTar(t, file("etc/group", "G")))
	files, _, err := Read(t.Context(), r.layers, r.fetch)
	require.NoError(t, err)
	require.Equal(t, Files{Passwd: []byte("P"), Group: []byte("G")}, files)
}

// A layer that is not the image's decides nothing, neither by what it has nor by
// what it lacks, nor by being broken: whoever can answer in the registry's place
// must not choose the user, nor be blamed on the image.
func TestReadVerifies(t *testing.T) {
	honest := makeTar(t, file("etc/passwd", "P"), file("etc/group", "G"))
	for name, served := range map[string][]byte{
		"other content":    makeTar(t, file("etc/passwd", "evil"), file("etc/group", "G")),
		"nothing":          makeTar(t, file("a", "b")),
		"broken":           bytes.Repeat([]byte("x"), len(honest)),
		"empty":            {},
		"cut off":          honest[:len(honest)-512],
		"longer":           append(bytes.Clone(honest), 0),
		"encrypted inside": makeTar(t, dir("etc/passwd")),
	} {
		t.Run(name, func(t *testing.T) {
			var r registry
			r.add(t, "", honest)
			r.blobs[r.layers[0].Descriptor.Digest] = served
			files, _, err := Read(t.Context(), r.layers, r.fetch)
			require.Truef(t, errdefs.IsDataLoss(err), "%v", err)
			require.Falsef(t, errdefs.IsFailedPrecondition(err), "%v", err)
			require.Equal(t, Files{}, files)
		})
	}
	// The manifest and the config do not go together. The chain ID, under which
	// the result is kept, is made of diff IDs.
	for _, encoding := range []string{"", "gzip", "zstd"} {
		t.Run("diff ID "+encoding, func(t *testing.T) {
			var r registry
			r.add(t, encoding, makeTar(t, file("etc/passwd", "evil"), file("etc/group", "G")))
			r.layers[0].DiffID = digest.FromBytes(honest)
			_, _, err := Read(t.Context(), r.layers, r.fetch)
			require.Truef(t, errdefs.IsDataLoss(err), "%v", err)
			require.ErrorContains(t, err, "diff ID")
		})
	}
	t.Run("behind the end of the archive", func(t *testing.T) {
		var r registry
		r.add(t, "gzip", append(bytes.Clone(honest), make([]byte, 64<<10)...))
		files, _, err := Read(t.Context(), r.layers, r.fetch)
		require.NoError(t, err)
		require.Equal(t, "P", string(files.Passwd))
	})
}

func TestReadSourceErrors(t *testing.T) {
	boom := errors.New("connection reset")
	var r registry
	r.add(t, "gzip", makeTar(t, file("etc/passwd", strings.Repeat("P", 100000))))
	for name, fetch := range map[string]Fetch{
		"fetch": func(context.Context, ocispec.Descriptor) (io.ReadCloser, error) { return nil, boom },
		"read": func(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
			return io.NopCloser(io.MultiReader(bytes.NewReader(r.blobs[desc.Digest][:100]), iotest.ErrReader(boom))), nil
		},
		"read at the end": func(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
			return io.NopCloser(io.MultiReader(bytes.NewReader(r.blobs[desc.Digest]), iotest.ErrReader(boom))), nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := Read(t.Context(), r.layers, fetch)
			require.ErrorIs(t, err, boom)
			require.Falsef(t, errdefs.IsFailedPrecondition(err), "%v", err)
			require.ErrorContains(t, err, r.layers[0].Descriptor.Digest.String())
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, _, err := Read(ctx, r.layers, r.fetch)
	require.ErrorIs(t, err, context.Canceled)
}

// spent reads an image and holds what that costs against what was put in: memory
// that is allocated, freed or not, and steps.
func spent(t *testing.T, r *registry, in int) (Files, error) {
	t.Helper()
	const free = 1 << 20
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	reader := newReader(t.Context(), r.layers, r.fetch)
	reader.free = free
	files, err := reader.read(t.Context())
	runtime.ReadMemStats(&after)

	// Each reading of a layer has buffers and windows of its own, and a file's content
	// is there before it has come. Besides, a byte of an archive may become a record,
	// a node or a part of a name.
	scans := 0
	for _, l := range reader.layers {
		scans += l.scans
	}
	const buffers, perByte = 48 << 20, 400
	allocated := after.TotalAlloc - before.TotalAlloc
	require.Lessf(t, allocated, uint64(scans*buffers+maxMemory)+uint64(reader.unpacked*perByte), "bytes allocated for %d bytes, %d unpacked, %d readings", in, reader.unpacked, scans)
	require.LessOrEqual(t, reader.unpacked, int64(free+maxRatio*scans*in+1<<20+MaxFileSize), "bytes unpacked of %d", in)
	// A name of one block can lead over maxLinks links, each as long as a path can be.
	require.LessOrEqual(t, reader.steps, maxSteps+maxPath)
	require.LessOrEqual(t, reader.files+reader.tree, maxMemory+MaxFileSize)
	return files, err
}

// FuzzReadStored feeds made-up blobs, compressed or not: whatever they unpack to is
// not what the diff ID says, unless they are archives as they are.
func FuzzReadStored(f *testing.F) {
	var r registry
	honest := makeTar(f, dir("etc"), file("etc/passwd", "P"), symlinkTo("etc/group", "/a"))
	for _, encoding := range []string{"", "gzip", "zstd"} {
		r.add(f, encoding, honest)
		blob := r.blobs[r.layers[len(r.layers)-1].Descriptor.Digest]
		f.Add(blob)
		f.Add(append(bytes.Clone(blob), blob...))
		f.Add(blob[:len(blob)/2])
	}
	f.Add([]byte{0x28, 0xb5, 0x2f, 0xfd, 0, 0x38, 0x02, 0, 0x10, 0, 0x03, 0, 0x10, 0})
	f.Add([]byte{0x50, 0x2a, 0x4d, 0x18, 0xff, 0xff, 0xff, 0xff, 0})
	f.Fuzz(func(t *testing.T, blob []byte) {
		var r registry
		r.add(t, "", blob)
		files, err := spent(t, &r, len(blob))
		if err == nil {
			return
		}
		require.Equal(t, Files{}, files)
		require.True(t, isUnusable(err) || errdefs.IsDataLoss(err), "%v", err)
	})
}

// FuzzRead feeds made-up tar streams, as one layer and as two.
func FuzzRead(f *testing.F) {
	f.Add(makeTar(f, dir("etc"), file("etc/passwd", "P"), symlinkTo("etc/group", "/a")), makeTar(f, file("a", "G"), file("etc/.wh.passwd", "")))
	f.Add(makeTar(f, symlinkTo("etc", "x/y"), hardlinkTo("x/y/passwd", "etc/../a"), file("a", "")), makeTar(f, symlinkTo("x", "..")))
	f.Add([]byte{0x1f, 0x8b}, []byte{0x28, 0xb5, 0x2f, 0xfd})
	f.Add(makeTar(f, entry{name: "etc/", opaqueRecord: true}, entry{name: "etc/passwd", typ: tar.TypeChar}), makeTar(f))
	f.Fuzz(func(t *testing.T, low, high []byte) {
		var r registry
		r.add(t, "", low)
		r.add(t, "", high)
		files, err := spent(t, &r, len(low)+len(high))
		if err != nil {
			// The layers are what they are said to be, so it is the image, unless
			// they turn out to be compressed.
			require.Truef(t, isUnusable(err) || errdefs.IsDataLoss(err), "%v", err)
			require.Equal(t, Files{}, files)
			return
		}
		require.LessOrEqual(t, len(files.Passwd), MaxFileSize)
		again, _, err := Read(t.Context(), r.layers, r.fetch)
		require.NoError(t, err)
		require.Equal(t, files, again)
	})
}
