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
package machine

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const testBlocks = 64

func newTestDisk(t *testing.T) *disk {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "disk")
	require.NoError(t, os.WriteFile(path, make([]byte, testBlocks*block), 0o600))
	d, err := newDisk(path, filepath.Join(dir, "socket"))
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, d.close()) })
	return d
}

func (d *disk) mustDo(t *testing.T, command, flags uint16, offset uint64, data []byte) {
	t.Helper()
	require.NoError(t, d.do(command, flags, offset, uint32(len(data)), data))
}

func blocks(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n*block) }

// What was flushed, or written through, is there after a cut. Of the rest each block
// is as it was or as it was written last, and no disk is a mixture within one.
func TestCut(t *testing.T) {
	kept, lost := 0, 0
	for seed := range uint64(20) {
		d := newTestDisk(t)
		d.mustDo(t, cmdWrite, 0, 0, blocks('a', testBlocks))
		d.mustDo(t, cmdFlush, 0, 0, nil)
		d.mustDo(t, cmdWrite, 0, 0, blocks('b', 32))
		d.mustDo(t, cmdWrite, flagFUA, 40*block, blocks('c', 2))
		seen := make([]byte, block)
		d.mustDo(t, cmdRead, 0, 5*block, seen)
		require.Equal(t, blocks('b', 1), seen, "a machine reads what it has written")

		written, gone, err := d.cut(rand.New(rand.NewPCG(seed, 0)))
		require.NoError(t, err)
		require.Equal(t, 32, written)
		kept, lost = kept+written-gone, lost+gone
		all := make([]byte, testBlocks*block)
		d.mustDo(t, cmdRead, 0, 0, all)
		for i := range testBlocks {
			got := all[i*block : (i+1)*block]
			require.Equal(t, blocks(got[0], 1), got, "block %d", i)
			switch {
			case i < 32 && got[0] == 'a':
				gone--
			case i < 32:
				require.Equal(t, byte('b'), got[0], "block %d", i)
			case i == 40 || i == 41:
				require.Equal(t, byte('c'), got[0], "block %d", i)
			default:
				require.Equal(t, byte('a'), got[0], "block %d", i)
			}
		}
		require.Zero(t, gone, "blocks that are lost and there")
	}
	require.NotZero(t, kept)
	require.NotZero(t, lost)
}

// A disk whose cache is as full as a cut waits for does not answer any more: what the
// machine would do upon the answer is not done. Served again, it does.
func TestCutWhileWriting(t *testing.T) {
	d := newTestDisk(t)
	connect := func() net.Conn {
		conn, err := net.Dial("unix", d.listen.Addr().String())
		require.NoError(t, err)
		t.Cleanup(func() { conn.Close() })
		require.NoError(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
		_, err = io.CopyN(io.Discard, conn, 18)
		require.NoError(t, err)
		_, err = conn.Write(binary.BigEndian.AppendUint32(nil, 3))
		require.NoError(t, err)
		_, err = conn.Write(binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(nil, optionMagic), optExportName), 0))
		require.NoError(t, err)
		_, err = io.CopyN(io.Discard, conn, 10)
		require.NoError(t, err)
		return conn
	}
	request := func(conn net.Conn, command uint16, n uint64, data []byte) {
		b := binary.BigEndian.AppendUint32(nil, requestMagic)
		b = binary.BigEndian.AppendUint16(b, 0)
		b = binary.BigEndian.AppendUint16(b, command)
		b = binary.BigEndian.AppendUint64(b, n)
		b = binary.BigEndian.AppendUint64(b, n*block)
		b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
		_, err := conn.Write(append(b, data...))
		require.NoError(t, err)
	}
	answered := func(conn net.Conn) error {
		_, err := io.CopyN(io.Discard, conn, 16)
		return err
	}
	conn := connect()
	full := d.fill(2)
	request(conn, cmdWrite, 0, blocks('a', 1))
	require.NoError(t, answered(conn))
	request(conn, cmdFlush, 0, nil)
	require.NoError(t, answered(conn))
	request(conn, cmdWrite, 1, blocks('b', 1))
	require.NoError(t, answered(conn))
	request(conn, cmdWrite, 2, blocks('c', 1))
	<-full
	request(conn, cmdFlush, 0, nil)
	require.NoError(t, conn.SetDeadline(time.Now().Add(100*time.Millisecond)))
	require.ErrorIs(t, answered(conn), os.ErrDeadlineExceeded)
	written, _, err := d.cut(rand.New(rand.NewPCG(0, 0)))
	require.NoError(t, err)
	require.Equal(t, 2, written, "the flush was done")
	conn = connect()
	request(conn, cmdWrite, 1, blocks('d', 3))
	require.NoError(t, answered(conn))
}

func TestDiskRequests(t *testing.T) {
	d := newTestDisk(t)
	d.mustDo(t, cmdWrite, 0, 0, blocks('a', testBlocks))
	d.mustDo(t, cmdFlush, 0, 0, nil)
	// Neither begins nor ends with a block.
	d.mustDo(t, cmdWrite, 0, block-512, bytes.Repeat([]byte{'b'}, block+1024))
	d.mustDo(t, cmdWriteZeroes, flagFUA, 8*block+512, make([]byte, 512))
	d.mustDo(t, cmdFlush, 0, 0, nil)
	want := blocks('a', testBlocks)
	copy(want[block-512:], bytes.Repeat([]byte{'b'}, block+1024))
	copy(want[8*block+512:], make([]byte, 512))
	got := make([]byte, len(want))
	d.mustDo(t, cmdRead, 0, 0, got)
	require.True(t, bytes.Equal(want, got))
	require.Equal(t, 2, d.Flushes())

	require.ErrorIs(t, d.do(cmdWrite, 0, testBlocks*block-512, 1024, make([]byte, 1024)), errInvalid)
	require.ErrorIs(t, d.do(cmdRead, 0, 1<<63, 1<<31, nil), errInvalid)
	require.ErrorIs(t, d.do(9, 0, 0, 0, nil), errInvalid)
}

// What is on the disk of a machine that is off can be looked at, and the mount is gone
// then, and was nobody else's.
func TestInspect(t *testing.T) {
	m := &Machine{o: Options{Dir: t.TempDir()}}
	files := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(files, "hello"), []byte("world"), 0o600))
	out, err := exec.CommandContext(t.Context(), "mke2fs", "-q", "-t", "ext4", "-d", files, m.path("disk"), "16M").CombinedOutput()
	require.NoError(t, err, "%s", out)
	for range 2 {
		require.NoError(t, m.Inspect(func(root string) error {
			b, err := os.ReadFile(filepath.Join(root, "hello"))
			assert.Equal(t, "world", string(b))
			elsewhere, listErr := exec.CommandContext(t.Context(), "nsenter", "--mount=/proc/"+strconv.Itoa(os.Getppid())+"/ns/mnt", "ls", "-A", root).CombinedOutput()
			assert.NoError(t, listErr)
			assert.Empty(t, string(elsewhere))
			return err
		}))
	}
	require.ErrorContains(t, m.Inspect(func(string) error { return errors.New("not sound") }), "not sound")
}
