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
// Package hostile has images that were made to hurt the host that looks into them,
// and runs the reading of each in a process of its own, with a limit on its memory
// and on its time.
package hostile

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Layer is a layer as a registry has it. Its digest and its diff ID are right unless
// they are given.
type Layer struct {
	Blob   []byte
	Desc   ocispec.Descriptor
	DiffID digest.Digest
}

// Image is a made-up image, the lowest layer first.
type Image struct {
	Layers []Layer
	// Error is a part of the error by which it is refused, "" if its users are
	// found, or found to be none.
	Error string
}

// Images are the corpus by name. They are made when they are asked for.
var Images = map[string]func() Image{
	// The header of an entry stays in memory as long as a name that is cut from it.
	"long PAX headers of short links": func() Image {
		return gz("", archive(func(w *writer) {
			for i := range 200 {
				link(w, fmt.Sprintf("l%d", i), "x", map[string]string{"GUEST.x": strings.Repeat("x", 1<<20-4096)})
			}
		}))
	},
	"links in deep directories": func() Image {
		return gz("bytes of memory", archive(func(w *writer) {
			for i := range 2000 {
				link(w, fmt.Sprintf("%d/%sl", i, strings.Repeat("d/", 400)), "x", nil)
			}
		}))
	},
	"a directory deeper than a path can be": func() Image {
		return gz("limit is 512 directories", archive(func(w *writer) { link(w, strings.Repeat("a/", 2000)+"l", "x", nil) }))
	},
	"a path of 80,000 components": func() Image {
		return gz("limit is 4096 bytes", archive(func(w *writer) { link(w, strings.Repeat("a/", 80000)+"l", "x", nil) }))
	},
	"a link's target of a megabyte": func() Image {
		return gz("limit is 4096 bytes", archive(func(w *writer) { link(w, "l", strings.Repeat("a/", 400000), nil) }))
	},
	"links made of links": func() Image {
		return gz("limit is 255 links", archive(func(w *writer) {
			link(w, "l0", ".", nil)
			for i := 1; i < 16; i++ {
				link(w, fmt.Sprintf("l%d", i), strings.Repeat(fmt.Sprintf("l%d/", i-1), 1000), nil)
			}
			file(w, "l15/x", "")
		}))
	},
	"long ways around": func() Image {
		return gz("path components", archive(func(w *writer) {
			link(w, "l", strings.Repeat("./", 2000), nil)
			for range 1000 {
				file(w, strings.Repeat("l/", 100)+"x", "")
			}
		}))
	},
	"up and down": func() Image {
		return gz("path components", archive(func(w *writer) {
			link(w, "l", strings.Repeat("a/b/c/../../../", 250), nil)
			for range 1000 {
				file(w, strings.Repeat("l/", 100)+"x", "")
			}
		}))
	},
	"PAX records": func() Image {
		var records strings.Builder
		for records.Len() < 1<<20-16 {
			records.WriteString("7 G=ab\n")
		}
		h := header(tar.TypeXHeader, "PaxHeaders.0/x", int64(records.Len()))
		one := append(append(h, padded(records.String())...), header(tar.TypeReg, "x", 0)...)
		return gz("", append(bytes.Repeat(one, 100), make([]byte, 1024)...))
	},
	"more records than anybody needs": func() Image {
		return gz("", archive(func(w *writer) {
			for range 10 {
				records := map[string]string{}
				for i := range 40000 {
					records[fmt.Sprintf("G.%d", i)] = "x"
				}
				check(w.WriteHeader(&tar.Header{Name: "x", Typeflag: tar.TypeReg, PAXRecords: records, Format: tar.FormatPAX}))
			}
		}))
	},
	"8 GiB in 256 KiB of zstd": func() Image {
		return one("times what was fetched", ocispec.MediaTypeImageLayerZstd, zstdZeros(65536, 17))
	},
	"a zstd window of 128 MiB": func() Image {
		return one("limit is 33554432 bytes", ocispec.MediaTypeImageLayerZstd, zstdZeros(8192, 27))
	},
	"a zstd window of 2 GiB": func() Image {
		return one("limit is 33554432 bytes", ocispec.MediaTypeImageLayerZstd, zstdZeros(8192, 31))
	},
	"a zstd window of 32 MiB": func() Image { return one("", ocispec.MediaTypeImageLayerZstd, zstdZeros(2048, 25)) },
	"skippable frames": func() Image {
		return one("", ocispec.MediaTypeImageLayerZstd, append(bytes.Repeat([]byte{0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0}, 1<<20), zstdZeros(8, 17)...))
	},
	"a skippable frame of 4 GiB": func() Image {
		return one("cannot be read", ocispec.MediaTypeImageLayerZstd, []byte{0x50, 0x2a, 0x4d, 0x18, 0xff, 0xff, 0xff, 0xff, 0})
	},
	"4 GiB in 4 MiB of gzip": func() Image {
		return one("times what was fetched", ocispec.MediaTypeImageLayerGzip, bytes.Repeat(gzipped(make([]byte, 64<<20)), 64))
	},
	"gzip members of nothing": func() Image {
		return one("", ocispec.MediaTypeImageLayerGzip, append(bytes.Repeat(gzipped(nil), 1<<19), gzipped(make([]byte, 1024))...))
	},
	"more behind the end": func() Image {
		return one("cannot be read", ocispec.MediaTypeImageLayerGzip, append(gzipped(make([]byte, 1024)), make([]byte, 64<<20)...))
	},
	"zeros behind the end": func() Image { return gz("", make([]byte, 128<<20)) },
	"many empty directories": func() Image {
		return gz("", append(bytes.Repeat(header(tar.TypeDir, "a/b/c/d/", 0), 1<<18), make([]byte, 1024)...))
	},
	"sparse users, a thousand times": func() Image {
		return gz("bytes of memory", archive(func(w *writer) {
			for range 1000 {
				sparse(w, "etc/passwd", 10<<20, 0)
			}
		}))
	},
	"users larger than the disk": func() Image {
		return gz("larger than", archive(func(w *writer) { sparse(w, "etc/passwd", 1<<62, 0) }))
	},
	"a sparse file of many holes": func() Image {
		return gz("", archive(func(w *writer) { sparse(w, "etc/passwd", 1<<20, 40000) }))
	},
	"users that are replaced": func() Image {
		return gz("bytes of memory", archive(func(w *writer) {
			for range 8 {
				file(w, "etc/passwd", strings.Repeat("x", 10<<20))
			}
		}))
	},
	"users behind a thousand links": func() Image {
		return gz("on the way", archive(func(w *writer) {
			for i := range 5000 {
				link(w, "etc/passwd", fmt.Sprintf("/x%d", i), nil)
			}
		}))
	},
	"hard links in circles": func() Image {
		return gz("not there", archive(func(w *writer) {
			hard(w, "a", "b")
			hard(w, "b", "a")
			hard(w, "etc/passwd", "etc/group")
			hard(w, "etc/group", "etc/passwd")
		}))
	},
	"hard links that lead on": func() Image {
		return gz("readings of a layer", archive(func(w *writer) {
			file(w, "h100", "x")
			for i := 99; i >= 0; i-- {
				hard(w, fmt.Sprintf("h%d", i), fmt.Sprintf("h%d", i+1))
			}
			hard(w, "etc/passwd", "h0")
		}))
	},
	"links that need another reading": func() Image {
		return gz("readings of a layer", archive(func(w *writer) {
			for i := 100; i > 0; i-- {
				link(w, fmt.Sprintf("d%d/x", i-1), fmt.Sprintf("/d%d/../d%d/x", i, i), nil)
			}
			link(w, "etc/passwd", "/d0/../d0/x", nil)
		}))
	},
	"links in circles": func() Image {
		return gz("limit is 255 links", archive(func(w *writer) {
			link(w, "etc", "a", nil)
			link(w, "a", "b/../a/x", nil)
			link(w, "b", "etc", nil)
		}))
	},
	"whiteouts of whiteouts": func() Image {
		return gz("", archive(func(w *writer) {
			for _, name := range []string{"etc/.wh..wh.passwd", ".wh..wh.etc", "etc/.wh..wh..wh..opq", ".wh..wh..opq", "etc/.wh..wh..opq", "x/.wh.a/.wh.b"} {
				file(w, name, "")
			}
		}))
	},
	"a whiteout of nothing": func() Image {
		return gz("whiteout of nothing", archive(func(w *writer) { file(w, "etc/.wh...", "") }))
	},
	"truncated gzip":   func() Image { return one("cannot be read", ocispec.MediaTypeImageLayerGzip, cut(gzipped(someUsers()))) },
	"truncated zstd":   func() Image { return one("cannot be read", ocispec.MediaTypeImageLayerZstd, cut(zstded(someUsers()))) },
	"truncated tar":    func() Image { return one("cannot be read", ocispec.MediaTypeImageLayer, someUsers()[:520]) },
	"truncated header": func() Image { return one("cannot be read", ocispec.MediaTypeImageLayer, someUsers()[:100]) },
	"a size that is a lie": func() Image {
		return gz("cannot be read", append(header(tar.TypeReg, "etc/passwd", 9<<20), 'x'))
	},
	"a record that is longer than the header": func() Image { return pax("999999999 path=x\n") },
	"a record without an end":                 func() Image { return pax("12 path=xxxxx") },
	"a record of a negative length":           func() Image { return pax("-5 path=x\n") },
	"a negative size":                         func() Image { return pax("10 size=-1\n") },
	"a sparse map of nonsense":                func() Image { return pax("22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n") },
	"a negative size in the manifest": func() Image {
		i := gz("the size -5", someUsers())
		i.Layers[0].Desc.Size = -5
		return i
	},
	"a size in the manifest beyond all": func() Image {
		i := gz("bytes fetched", someUsers())
		i.Layers[0].Desc.Size = 1<<63 - 1
		return i
	},
	"layers that need not exist": func() Image {
		i := Image{Error: "not found"}
		for k := range 40000 {
			d := digest.FromString(fmt.Sprint(k))
			i.Layers = append(i.Layers, Layer{Desc: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: d, Size: 1}, DiffID: d})
		}
		return i
	},
	"ten thousand layers": func() Image {
		i := gz("", archive(func(*writer) {}))
		for len(i.Layers) < 10000 {
			i.Layers = append(i.Layers, i.Layers[0])
		}
		return i
	},
	"long ways through many layers": func() Image {
		empty := archive(func(*writer) {})
		i := gz("limit is 255 links", archive(func(w *writer) {
			link(w, strings.Repeat("d/", 400)+"l", "/"+strings.Repeat("d/", 400)+"l", nil)
			link(w, "etc/passwd", "/"+strings.Repeat("d/", 400)+"l", nil)
		}))
		for len(i.Layers) < 1000 {
			i.Layers = append([]Layer{gz("", empty).Layers[0]}, i.Layers...)
		}
		return i
	},
	"another layer than the manifest says": func() Image {
		i := gz("data loss", someUsers())
		i.Layers[0].Blob = gzipped(archive(func(w *writer) { file(w, "etc/passwd", "evil") }))
		i.Layers[0].Desc.Size = int64(len(i.Layers[0].Blob))
		return i
	},
	"a layer that is said to be another": func() Image {
		i := gz("diff ID", someUsers())
		i.Layers[0].DiffID = digest.FromString("another")
		return i
	},
}

func someUsers() []byte {
	return archive(func(w *writer) {
		file(w, "etc/passwd", "root:x:0:0::/:\n")
		file(w, "etc/group", "root:x:0:\n")
	})
}

// gz is an image of one layer, compressed by gzip.
func gz(err string, content []byte) Image {
	b := gzipped(content)
	return Image{Error: err, Layers: []Layer{{
		Blob: b, DiffID: digest.FromBytes(content),
		Desc: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(b), Size: int64(len(b))},
	}}}
}

// one is an image of one layer, as it is stored. What it has when it is unpacked is
// found out if it matters.
func one(err, mediaType string, blob []byte) Image {
	l := Layer{Blob: blob, DiffID: digest.FromString("unknown"), Desc: ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(blob), Size: int64(len(blob))}}
	if err == "" {
		d := digest.SHA256.Digester()
		var r io.Reader
		if mediaType == ocispec.MediaTypeImageLayerZstd {
			z, zerr := zstd.NewReader(bytes.NewReader(blob))
			check(zerr)
			defer z.Close()
			r = z
		} else {
			z, zerr := gzip.NewReader(bytes.NewReader(blob))
			check(zerr)
			r = z
		}
		_, cerr := io.Copy(d.Hash(), r)
		check(cerr)
		l.DiffID = d.Digest()
	}
	return Image{Error: err, Layers: []Layer{l}}
}

// pax is an image of one entry with a PAX header.
func pax(records string) Image {
	b := append(header(tar.TypeXHeader, "PaxHeaders.0/x", int64(len(records))), padded(records)...)
	b = append(append(b, header(tar.TypeReg, "etc/passwd", 0)...), make([]byte, 1024)...)
	return gz("cannot be read", b)
}

// writer writes an archive, and lets raw bytes into it.
type writer struct {
	*tar.Writer
	b *bytes.Buffer
}

func archive(fill func(*writer)) []byte {
	w := writer{b: &bytes.Buffer{}}
	w.Writer = tar.NewWriter(w.b)
	fill(&w)
	check(w.Close())
	return w.b.Bytes()
}

func file(w *writer, name, data string) {
	check(w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(data))}))
	_, err := io.WriteString(w, data)
	check(err)
}

func link(w *writer, name, to string, records map[string]string) {
	check(w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: to, PAXRecords: records}))
}

func hard(w *writer, name, to string) {
	check(w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: to}))
}

// sparse writes a sparse file of GNU's format 1.0, with nothing in it but holes.
func sparse(w *writer, name string, size int64, holes int) {
	check(w.Flush())
	var m strings.Builder
	fmt.Fprintln(&m, holes)
	for i := range holes {
		fmt.Fprintf(&m, "%d\n0\n", i)
	}
	content := padded(m.String())
	var records strings.Builder
	for _, kv := range []string{"GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=" + name, fmt.Sprintf("GNU.sparse.realsize=%d", size)} {
		n := len(kv) + 4 // with a blank, a line break and two digits
		fmt.Fprintf(&records, "%d %s\n", n, kv)
	}
	w.b.Write(header(tar.TypeXHeader, "PaxHeaders.0/x", int64(records.Len())))
	w.b.WriteString(padded(records.String()))
	w.b.Write(header(tar.TypeReg, "x", int64(len(content))))
	w.b.WriteString(content)
}

// header is a header of the format ustar.
func header(typ byte, name string, size int64) []byte {
	h := make([]byte, 512)
	copy(h, name)
	copy(h[100:], "0000644\x000000000\x000000000\x00")
	copy(h[124:], fmt.Sprintf("%011o\x00", size))
	copy(h[136:], "00000000000\x00")
	h[156] = typ
	copy(h[257:], "ustar\x0000")
	copy(h[148:], "        ")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	return h
}

func padded(s string) string { return s + strings.Repeat("\x00", (512-len(s)%512)%512) }

func gzipped(content []byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, err := w.Write(content)
	check(err)
	check(w.Close())
	return b.Bytes()
}

func zstded(content []byte) []byte {
	var b bytes.Buffer
	w, err := zstd.NewWriter(&b)
	check(err)
	_, err = w.Write(content)
	check(err)
	check(w.Close())
	return b.Bytes()
}

// zstdZeros is a frame of blocks that each say 128 KiB of zeros in four bytes.
func zstdZeros(blocks, windowLog int) []byte {
	b := []byte{0x28, 0xb5, 0x2f, 0xfd, 0, byte(windowLog-10) << 3}
	for i := range blocks {
		h := 128<<10<<3 | 1<<1
		if i == blocks-1 {
			h |= 1
		}
		b = append(b, byte(h), byte(h>>8), byte(h>>16), 0)
	}
	return b
}

func cut(b []byte) []byte { return b[:len(b)/2] }

func check(err error) {
	if err != nil {
		panic(err)
	}
}
