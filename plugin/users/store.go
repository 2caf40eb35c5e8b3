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
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/guest-pull/guest-pull-snapshotter/plugin/internal/guard"
)

// store keeps the users and groups of images by their chain ID. It is a
// cache: what is lost is read again when the image is next pulled.
type store struct {
	db *bolt.DB
}

var (
	bucketUsers = []byte("v1")
	keyPasswd   = []byte("passwd")
	keyGroup    = []byte("group")

	// prefixUnusable begins the keys for the bytes that an image was read from in
	// vain, with the reason as the value. There are no other keys beside them.
	prefixUnusable = []byte("unusable ")
)

const (
	maxUnusable = 16   // of one chain ID; anybody can make them
	maxReason   = 1024 // bytes
)

// openStore opens the store. One that cannot be read is replaced.
func openStore(ctx context.Context, path string) (*store, error) {
	s, err := tryStore(path)
	if err == nil {
		return s, nil
	}
	if errors.Is(err, berrors.ErrTimeout) || !errors.Is(err, guard.ErrDamaged) {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	log.G(ctx).WithError(err).WithField("path", path).Warn("what was kept of images' users and groups is damaged and starts anew: it is read again when the images are next pulled")
	if err := os.Remove(path); err != nil {
		return nil, fmt.Errorf("replace a damaged store of users: %w", err)
	}
	if s, err = tryStore(path); err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return s, nil
}

// tryStore opens the store and reads all of it.
func tryStore(path string) (s *store, err error) {
	err = guard.Do(func() error {
		db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: 5 * time.Second})
		switch {
		case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrChecksum), errors.Is(err, berrors.ErrVersionMismatch):
			return fmt.Errorf("%w: %w", guard.ErrDamaged, err)
		case err != nil:
			return err
		}
		size := 0
		err = db.Update(func(tx *bolt.Tx) error {
			b, err := tx.CreateBucketIfNotExists(bucketUsers)
			if err != nil {
				return fmt.Errorf("%w: %w", guard.ErrDamaged, err)
			}
			return b.ForEachBucket(func(k []byte) error {
				return b.Bucket(k).ForEach(func(_, v []byte) error {
					size += len(bytes.Clone(v)) // a file that is cut off faults here
					return nil
				})
			})
		})
		if err != nil {
			return errors.Join(err, db.Close())
		}
		s = &store{db}
		return nil
	})
	return s, err
}

func (s *store) close() error { return s.db.Close() }

// view and update are transactions that survive a damaged file.
func (s *store) view(fn func(*bolt.Bucket) error) error {
	return guard.Do(func() error {
		return s.db.View(func(tx *bolt.Tx) error { return fn(tx.Bucket(bucketUsers)) })
	})
}

func (s *store) update(fn func(*bolt.Bucket) error) error {
	return guard.Do(func() error {
		return s.db.Update(func(tx *bolt.Tx) error { return fn(tx.Bucket(bucketUsers)) })
	})
}

// isKnown tells whether an image's bucket has its files. What an earlier version
// kept of images that it had read in vain is as if there were nothing.
func isKnown(b *bolt.Bucket) bool {
	if b == nil {
		return false
	}
	k, _ := b.Cursor().Seek(bytes.TrimSpace(prefixUnusable))
	return !bytes.HasPrefix(k, bytes.TrimSpace(prefixUnusable))
}

// get returns the files of an image, and whether they are known.
func (s *store) get(chain string) (files Files, known bool, err error) {
	err = s.view(func(b *bolt.Bucket) error {
		b = b.Bucket([]byte(chain))
		if known = isKnown(b); !known {
			return nil
		}
		// Values are valid in the transaction only. A missing one stays nil.
		files = Files{Passwd: bytes.Clone(b.Get(keyPasswd)), Group: bytes.Clone(b.Get(keyGroup))}
		return nil
	})
	return files, known, err
}

// state tells whether the files of an image are known, or else whether it was read
// in vain from these bytes.
func (s *store) state(chain, stored string) (known, unusable bool, err error) {
	err = s.view(func(b *bolt.Bucket) error {
		b = b.Bucket([]byte(chain))
		known = isKnown(b)
		unusable = b != nil && b.Get(append(prefixUnusable[:len(prefixUnusable):len(prefixUnusable)], stored...)) != nil
		return nil
	})
	return known, unusable, err
}

// has tells whether there is anything about an image.
func (s *store) has(chain string) (found bool, err error) {
	err = s.view(func(b *bolt.Bucket) error {
		found = b.Bucket([]byte(chain)) != nil
		return nil
	})
	return found, err
}

// putUnusable notes that an image was read in vain from these bytes.
func (s *store) putUnusable(chain, stored, why string) error {
	return s.update(func(b *bolt.Bucket) error {
		if isKnown(b.Bucket([]byte(chain))) {
			return nil // from other bytes, which were right
		}
		b, err := b.CreateBucketIfNotExists([]byte(chain))
		if err != nil {
			return err
		}
		if b.Stats().KeyN >= maxUnusable {
			if err := forgetUnusable(b); err != nil {
				return err
			}
		}
		return b.Put(append(prefixUnusable[:len(prefixUnusable):len(prefixUnusable)], stored...), []byte(why[:min(len(why), maxReason)]))
	})
}

func forgetUnusable(b *bolt.Bucket) error {
	var keys [][]byte
	_ = b.ForEach(func(k, _ []byte) error {
		if bytes.HasPrefix(k, bytes.TrimSpace(prefixUnusable)) {
			keys = append(keys, bytes.Clone(k))
		}
		return nil
	})
	for _, k := range keys {
		if err := b.Delete(k); err != nil {
			return err
		}
	}
	return nil
}

func (s *store) put(chain string, files Files) error {
	return s.update(func(b *bolt.Bucket) error {
		b, err := b.CreateBucketIfNotExists([]byte(chain))
		if err != nil {
			return err
		}
		if err := forgetUnusable(b); err != nil {
			return err
		}
		for _, f := range []struct{ key, content []byte }{{keyPasswd, files.Passwd}, {keyGroup, files.Group}} {
			if f.content == nil {
				err = b.Delete(f.key)
			} else {
				err = b.Put(f.key, f.content)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// remove forgets an image. One that is not known is no error, and costs no
// write.
func (s *store) remove(chain string) error {
	if found, err := s.has(chain); err != nil || !found {
		return err
	}
	return s.update(func(b *bolt.Bucket) error {
		err := b.DeleteBucket([]byte(chain))
		if errors.Is(err, berrors.ErrBucketNotFound) {
			return nil
		}
		return err
	})
}

// chains lists the images that were read.
func (s *store) chains() (chains []string, err error) {
	err = s.view(func(b *bolt.Bucket) error {
		return b.ForEachBucket(func(k []byte) error {
			chains = append(chains, string(k))
			return nil
		})
	})
	return chains, err
}
