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
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
)

// disk is the disk of a machine: a file, and in front of it a cache that forgets, as
// that of a drive does. What the machine writes is in the cache until it flushes;
// a cut loses of the cache whatever it likes.
//
// It speaks the part of the NBD protocol that QEMU does (nbd, doc/proto.md: fixed
// newstyle negotiation, simple replies), on a socket in a directory of its own.
type disk struct {
	file   *os.File
	size   uint64
	listen net.Listener

	mu      sync.Mutex
	cache   map[uint64][]byte // block number -> what is not flushed
	conn    net.Conn
	flushes int
	served  sync.WaitGroup
	// When so many blocks are in the cache, full is closed, and nobody is answered any
	// more; 0: never.
	limit int
	full  chan struct{}
}

// block is what a power cut keeps or loses as a whole.
const block = 4096

func newDisk(path, socket string) (*disk, error) {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err == nil && info.Size()%block != 0 {
		err = fmt.Errorf("%s has %d bytes, not a multiple of %d", path, info.Size(), block)
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	d := &disk{file: file, size: uint64(info.Size()), cache: map[uint64][]byte{}}
	if d.listen, err = net.Listen("unix", socket); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	go func() {
		for {
			conn, err := d.listen.Accept()
			if err != nil {
				return // closed
			}
			d.mu.Lock()
			d.conn = conn
			d.served.Add(1)
			d.mu.Unlock()
			go func() {
				defer d.served.Done()
				defer conn.Close()
				// A machine that is killed says nothing more; one that is told
				// nothing more has an I/O error, which its console shows.
				_ = d.serve(conn)
			}()
		}
	}()
	return d, nil
}

// fill returns a channel that is closed as soon as so many blocks are in the cache. The
// request that brings them there, and all that follow, have no answer then.
func (d *disk) fill(blocks int) <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.limit, d.full = blocks, make(chan struct{})
	return d.full
}

// cut is what a loss of power does: of each block in the cache it keeps what the
// disk had before, or what was written last. The machine must not run any more. It
// returns how many blocks there were, and how many were lost.
func (d *disk) cut(random *rand.Rand) (written, lost int, err error) {
	d.disconnect()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.limit = 0
	// Sometimes nothing is lost, and sometimes everything.
	keep := random.Float64()*1.5 - 0.25
	numbers := make([]uint64, 0, len(d.cache))
	for n := range d.cache {
		numbers = append(numbers, n)
	}
	slices.Sort(numbers) // a seed repeats it
	for _, n := range numbers {
		if random.Float64() >= keep {
			lost++
			delete(d.cache, n)
		}
	}
	return len(numbers), lost, d.flush()
}

// Flushes returns how often the machine has waited for the disk.
func (d *disk) Flushes() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.flushes
}

// disconnect ends the connection, and returns when nothing is read from it any more.
func (d *disk) disconnect() {
	d.mu.Lock()
	if d.conn != nil {
		d.conn.Close()
	}
	d.mu.Unlock()
	d.served.Wait()
}

func (d *disk) close() error {
	err := d.listen.Close()
	d.disconnect()
	return errors.Join(err, d.file.Close())
}

// flush writes the cache to the file. The file need not survive this process. The
// caller has the lock.
func (d *disk) flush() error {
	for n, data := range d.cache {
		if _, err := d.file.WriteAt(data, int64(n*block)); err != nil {
			return err
		}
	}
	clear(d.cache)
	return nil
}

// each calls f for the part of each block that a range covers: the block's number,
// where in the block the part begins, and where in the range it is.
func each(offset, length uint64, f func(n, within, from, to uint64) error) error {
	for at := offset; at < offset+length; {
		n, within := at/block, at%block
		end := min((n+1)*block, offset+length)
		if err := f(n, within, at-offset, end-offset); err != nil {
			return err
		}
		at = end
	}
	return nil
}

func (d *disk) read(offset uint64, p []byte) error {
	if _, err := d.file.ReadAt(p, int64(offset)); err != nil {
		return err
	}
	return each(offset, uint64(len(p)), func(n, within, from, to uint64) error {
		if data, ok := d.cache[n]; ok {
			copy(p[from:to], data[within:])
		}
		return nil
	})
}

func (d *disk) write(offset uint64, p []byte) error {
	return each(offset, uint64(len(p)), func(n, within, from, to uint64) error {
		data, ok := d.cache[n]
		if !ok {
			data = make([]byte, block)
			if to-from != block {
				if _, err := d.file.ReadAt(data, int64(n*block)); err != nil {
					return err
				}
			}
			d.cache[n] = data
		}
		copy(data[within:], p[from:to])
		return nil
	})
}

// The protocol's numbers.
const (
	nbdMagic       = 0x4e42444d41474943 // "NBDMAGIC"
	optionMagic    = 0x49484156454f5054 // "IHAVEOPT"
	optionReply    = 0x3e889045565a9
	requestMagic   = 0x25609513
	replyMagic     = 0x67446698
	handshakeFlags = 1 | 2 // fixed newstyle, no zeroes
	exportFlags    = 1 | 4 | 8 | 64
	// has flags, can flush, can write through, can write zeroes

	optExportName = 1
	optAbort      = 2
	optInfo       = 6
	optGo         = 7
	repAck        = 1
	repInfo       = 3
	repUnknown    = 1<<31 | 1

	cmdRead        = 0
	cmdWrite       = 1
	cmdDisconnect  = 2
	cmdFlush       = 3
	cmdWriteZeroes = 6
	flagFUA        = 1

	nbdEIO    = 5
	nbdEINVAL = 22

	maxRequest = 64 << 20
)

var errDisconnect = errors.New("the client is done")

func (d *disk) negotiate(conn net.Conn) error {
	hello := binary.BigEndian.AppendUint64(nil, nbdMagic)
	hello = binary.BigEndian.AppendUint64(hello, optionMagic)
	hello = binary.BigEndian.AppendUint16(hello, handshakeFlags)
	if _, err := conn.Write(hello); err != nil {
		return err
	}
	var clientFlags uint32
	if err := binary.Read(conn, binary.BigEndian, &clientFlags); err != nil {
		return err
	}
	info := binary.BigEndian.AppendUint16(nil, 0) // NBD_INFO_EXPORT
	info = binary.BigEndian.AppendUint64(info, d.size)
	info = binary.BigEndian.AppendUint16(info, exportFlags)
	for {
		var o struct {
			Magic          uint64
			Option, Length uint32
		}
		if err := binary.Read(conn, binary.BigEndian, &o); err != nil {
			return err
		}
		if o.Magic != optionMagic || o.Length > maxRequest {
			return fmt.Errorf("not an NBD option: %+v", o)
		}
		if _, err := io.CopyN(io.Discard, conn, int64(o.Length)); err != nil {
			return err
		}
		reply := func(kind uint32, data []byte) error {
			b := binary.BigEndian.AppendUint64(nil, optionReply)
			b = binary.BigEndian.AppendUint32(b, o.Option)
			b = binary.BigEndian.AppendUint32(b, kind)
			b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
			_, err := conn.Write(append(b, data...))
			return err
		}
		switch o.Option {
		case optGo, optInfo:
			if err := errors.Join(reply(repInfo, info), reply(repAck, nil)); err != nil {
				return err
			}
			if o.Option == optGo {
				return nil
			}
		case optExportName:
			_, err := conn.Write(info[2:])
			return err
		case optAbort:
			return errors.Join(reply(repAck, nil), errDisconnect)
		default:
			if err := reply(repUnknown, nil); err != nil {
				return err
			}
		}
	}
}

func (d *disk) serve(conn net.Conn) error {
	if err := d.negotiate(conn); err != nil {
		return err
	}
	for {
		var r struct {
			Magic          uint32
			Flags, Command uint16
			Cookie         uint64
			Offset         uint64
			Length         uint32
		}
		if err := binary.Read(conn, binary.BigEndian, &r); err != nil {
			return err
		}
		if r.Magic != requestMagic || r.Length > maxRequest {
			return fmt.Errorf("not an NBD request: %+v", r)
		}
		data := make([]byte, 0)
		if r.Command == cmdWrite || r.Command == cmdRead {
			data = make([]byte, r.Length)
		}
		if r.Command == cmdWrite {
			if _, err := io.ReadFull(conn, data); err != nil {
				return err
			}
		}
		if r.Command == cmdDisconnect {
			return errDisconnect
		}
		var code uint32
		d.mu.Lock()
		err := d.do(r.Command, r.Flags, r.Offset, r.Length, data)
		full := d.limit > 0 && len(d.cache) >= d.limit
		d.mu.Unlock()
		if full {
			close(d.full)
			_, err := io.Copy(io.Discard, conn) // until the machine is killed
			return err
		}
		switch {
		case errors.Is(err, errInvalid):
			code = nbdEINVAL
		case err != nil:
			code = nbdEIO
		}
		reply := binary.BigEndian.AppendUint32(nil, replyMagic)
		reply = binary.BigEndian.AppendUint32(reply, code)
		reply = binary.BigEndian.AppendUint64(reply, r.Cookie)
		if r.Command == cmdRead && code == 0 {
			reply = append(reply, data...)
		}
		if _, err := conn.Write(reply); err != nil {
			return err
		}
	}
}

var errInvalid = errors.New("not a request that this disk knows")

func (d *disk) do(command, flags uint16, offset uint64, length uint32, data []byte) error {
	if offset > d.size || uint64(length) > d.size-offset {
		return errInvalid
	}
	var err error
	switch command {
	case cmdRead:
		return d.read(offset, data)
	case cmdWrite:
		err = d.write(offset, data)
	case cmdWriteZeroes:
		err = d.write(offset, make([]byte, length))
	case cmdFlush:
		d.flushes++
		return d.flush()
	default:
		return errInvalid
	}
	if err == nil && flags&flagFUA != 0 {
		err = d.through(offset, uint64(length))
	}
	return err
}

// through writes a range to the file, and nothing else of the cache.
func (d *disk) through(offset, length uint64) error {
	return each(offset, length, func(n, _, _, _ uint64) error {
		_, err := d.file.WriteAt(d.cache[n], int64(n*block))
		delete(d.cache, n)
		return err
	})
}
