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
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

func directoryName(chain string) string { return strings.ReplaceAll(chain, ":", "-") }

// Directory returns the directory for containers of an image. The image has to be in use already, or Cleanup may remove
// the directory.
func (u *Images) Directory(chain string) (string, error) {
	name, err := u.name(chain)
	if err != nil {
		return "", fmt.Errorf("users of the image with chain ID %s: %w", chain, err)
	}
	dir := filepath.Join(u.root, name)
	u.mu.RLock()
	ok := u.isIntact(name)
	u.mu.RUnlock()
	if ok {
		return dir, nil
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.isIntact(name) {
		return dir, nil
	}
	files, err := u.files(chain, name)
	if err != nil {
		return "", fmt.Errorf("users of the image with chain ID %s: %w", chain, err)
	}
	if !hasFiles(dir, files) {
		if err := makeDirectory(dir, files); err != nil {
			return "", fmt.Errorf("make a directory for the users of the image with chain ID %s: %w", chain, err)
		}
	}
	u.intact[name] = look(dir)
	return dir, nil
}

// fingerprint is what changes with a directory's files. The files can have
// megabytes, and are compared once for a fingerprint, not for each container.
type fingerprint struct {
	etc, passwd, group stamp
}

// stamp is the zero value for what is not there.
type stamp struct {
	inode                 uint64
	size                  int64
	mode                  uint32
	modified, changed     int64
	modifiedNs, changedNs int64
}

func look(dir string) fingerprint {
	at := func(elem ...string) (s stamp) {
		if info, err := os.Lstat(filepath.Join(append([]string{dir, "etc"}, elem...)...)); err == nil {
			st := info.Sys().(*syscall.Stat_t)
			s = stamp{st.Ino, st.Size, st.Mode, st.Mtim.Sec, st.Ctim.Sec, st.Mtim.Nsec, st.Ctim.Nsec}
		}
		return s
	}
	return fingerprint{at(), at("passwd"), at("group")}
}

func (u *Images) isIntact(name string) bool {
	seen, ok := u.intact[name]
	return ok && seen == look(filepath.Join(u.root, name))
}

// hasFiles tells whether a directory is as it has to be. Comparing the content
// makes up for what a power failure can do to files that were never synced.
func hasFiles(dir string, files Files) bool {
	for name, want := range map[string][]byte{"passwd": files.Passwd, "group": files.Group} {
		got, err := os.ReadFile(filepath.Join(dir, "etc", name))
		if want == nil && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil || want == nil || !bytes.Equal(got, want) {
			return false
		}
	}
	info, err := os.Stat(filepath.Join(dir, "etc"))
	return err == nil && info.IsDir()
}

// stagePrefix marks a directory that is not complete yet.
const stagePrefix = "new-"

func makeDirectory(dir string, files Files) (err error) {
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return err
	}
	stage, err := os.MkdirTemp(filepath.Dir(dir), stagePrefix)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(stage))
		}
	}()
	// It becomes the root directory of a mount, as which any user may see it.
	if err := errors.Join(os.Chmod(stage, 0o755), os.Mkdir(filepath.Join(stage, "etc"), 0o755)); err != nil {
		return err
	}
	for name, content := range map[string][]byte{"passwd": files.Passwd, "group": files.Group} {
		if content == nil {
			continue
		}
		if err := os.WriteFile(filepath.Join(stage, "etc", name), content, 0o644); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return os.Rename(stage, dir)
}

// Cleanup removes the directories of images that are not in use. inUse calls its
// argument with the images that containers are made of; no directory is made in
// the meantime.
func (u *Images) Cleanup(inUse func(func(chain string)) error) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	entries, err := os.ReadDir(u.root)
	if errors.Is(err, fs.ErrNotExist) || (err == nil && len(entries) == 0) {
		return nil
	} else if err != nil {
		return fmt.Errorf("clean up the users of images: %w", err)
	}
	needed := map[string]bool{}
	err = inUse(func(chain string) {
		needed[directoryName(chain)] = true
		needed[staticUsers] = true
	})
	if err != nil {
		return fmt.Errorf("clean up the users of images: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if !needed[e.Name()] {
			delete(u.intact, e.Name())
			errs = append(errs, os.RemoveAll(filepath.Join(u.root, e.Name())))
		}
	}
	return errors.Join(errs...)
}
