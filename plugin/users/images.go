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
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// Values of Config.Resolve.
const (
	// ResolveOff leaves image layers alone. It is the default.
	ResolveOff = "off"
	// ResolveRegistry reads the users and groups of an image out of its layers
	// in the registry when the image is pulled.
	ResolveRegistry = "registry"
)

// Config is what can be configured of the users of images. The zero value is the
// default: nothing is known.
type Config struct {
	// Users and Groups are an administrator's list of users, "uid" or "uid:gid"
	// by name, and of groups. Containers have them whose image's own are not
	// known.
	Users  map[string]string
	Groups map[string]Group

	// Resolve is where the users and groups of an image are read when it is
	// pulled: ResolveOff, which "" means too, or ResolveRegistry.
	Resolve string

	// Concurrency is how many images are read at once; 0 means
	// DefaultConcurrency. Each may take a hundred megabytes of memory, if
	// somebody makes an image for that.
	Concurrency int

	// Observe, unless nil, is called for each pulled image when Resolve is on:
	// "read", "known" already, "unusable", "refused" by the configuration of the
	// pull's runtime handler, or "failed".
	Observe func(result string)
}

// Validate reports all that is wrong with a configuration. Each error names the
// key, the value and what is accepted, and wraps errdefs.ErrInvalidArgument.
func (c Config) Validate() error {
	var errs []error
	switch c.Resolve {
	case "", ResolveOff, ResolveRegistry:
	default:
		errs = append(errs, fmt.Errorf("resolve_users = %q: want %q or %q: %w", c.Resolve, ResolveOff, ResolveRegistry, errdefs.ErrInvalidArgument))
	}
	if c.Concurrency < 0 {
		errs = append(errs, fmt.Errorf("resolve_users_concurrency = %d: want how many images may be read at once, 1 or more: %w", c.Concurrency, errdefs.ErrInvalidArgument))
	}
	_, err := Static(c.Users, c.Groups)
	return errors.Join(append(errs, err)...)
}

func (c Config) concurrency() int {
	if c.Concurrency == 0 {
		return DefaultConcurrency
	}
	return c.Concurrency
}

// Images gives containers the users and groups of their images: as the lowest
// directory of their mount, which has etc/passwd and etc/group and is otherwise
// empty. containerd and its clients look there. Images are known by the chain IDs of
// their top layers.
//
// The directories are made of what is known when they are needed (directory.go).
// What is known is read in a pull (pull.go) and kept (store.go), or is the
// administrator's list (static.go).
type Images struct {
	root   string // of the directories, each named like the chain ID of its image
	static Files
	known  *store // nil if nothing is read from registries
	// observe counts how pulled images fare; see Config.Observe.
	observe func(result string)

	mu     sync.RWMutex // guards the directories
	intact map[string]fingerprint

	queue     *queue
	maxShared time.Duration
	readMu    sync.Mutex
	reading   map[string]chan struct{} // closed when the image has been read
	refused   map[string]time.Time
}

// staticUsers is the name of the directory for images of which nothing is known.
const staticUsers = "static"

// New returns what is known of images' users. It keeps that below root, in
// users.db and users/. Errors of the configuration are those of Validate; it fails
// as well when root cannot be written, or when another process has users.db open.
// One that is damaged is replaced.
func New(ctx context.Context, root string, config Config) (*Images, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	u := &Images{root: filepath.Join(root, "users"), observe: config.Observe, intact: map[string]fingerprint{}}
	if u.observe == nil {
		u.observe = func(string) {}
	}
	var err error
	if u.static, err = Static(config.Users, config.Groups); err != nil {
		return nil, err
	}
	u.queue, u.maxShared = newQueue(config.concurrency()), maxShared
	u.reading, u.refused = map[string]chan struct{}{}, map[string]time.Time{}
	path := filepath.Join(root, "users.db")
	if config.Resolve != ResolveRegistry {
		// What was read when the option was set is not used without it.
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("remove what was kept of images' users: %w", err)
		}
		return u, nil
	}
	u.known, err = openStore(ctx, path)
	return u, err
}

// Close closes the store.
func (u *Images) Close() error {
	if u.known == nil {
		return nil
	}
	return u.known.close()
}

// Known lists the images whose users were read, in vain or not.
func (u *Images) Known() ([]string, error) {
	if u.known == nil {
		return nil, nil
	}
	return u.known.chains()
}

// Forget forgets an image. One that is not known is no error, and costs no write.
func (u *Images) Forget(chain string) error {
	if u.known == nil {
		return nil
	}
	return u.known.remove(chain)
}

// name returns the name of the directory for containers of an image. Of one of which
// nothing is known there are root and the list.
func (u *Images) name(chain string) (string, error) {
	if u.known != nil {
		known, _, err := u.known.state(chain, "")
		if err != nil {
			return "", err
		}
		if known {
			return directoryName(chain), nil
		}
	}
	return staticUsers, nil
}

// files returns what is in such a directory.
func (u *Images) files(chain, name string) (Files, error) {
	if name == staticUsers {
		return u.static, nil
	}
	files, known, err := u.known.get(chain)
	if err == nil && !known {
		err = fmt.Errorf("they were just forgotten, with the image: %w", errdefs.ErrNotFound)
	}
	return files, err
}
